use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Scrapers at the same time. Further ones wait in the kernel's queue.
pub const SCRAPERS_MAX: usize = 16;
/// How long a connection may take to send the head of a request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// After so long a connection is closed; scrapers connect again.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(300);

/// Answers `GET /metrics` over plain HTTP with what a function gives, until it is dropped.
#[derive(Debug)]
pub struct Scraped {
    local: SocketAddr,
    task: JoinHandle<()>,
}

impl Scraped {
    /// Listens. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn start<F, T>(listen: &str, text: F) -> std::io::Result<Scraped>
    where
        F: Fn() -> T + Send + Sync + 'static,
        T: Future<Output = String> + Send + 'static,
    {
        let listener = TcpListener::bind(listen).await?;
        let local = listener.local_addr()?;
        tracing::info!(%local, "metrics");
        let task = tokio::spawn(accept(listener, Arc::new(text)));
        Ok(Scraped { local, task })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for Scraped {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<F, T>(listener: TcpListener, text: Arc<F>)
where
    F: Fn() -> T + Send + Sync + 'static,
    T: Future<Output = String> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(SCRAPERS_MAX));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Such as no file handles: again later, for others may be given back.
                tracing::warn!(%error, "accept a scraper");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let text = text.clone();
        connections.spawn(async move {
            // A scraper that breaks off is its own affair.
            let _ = tokio::time::timeout(CONNECTION_TIME_MAX, serve(stream, text)).await;
            drop(permit);
        });
    }
}

async fn serve<F, T>(stream: TcpStream, text: Arc<F>) -> Result<(), hyper::Error>
where
    F: Fn() -> T + Send + Sync + 'static,
    T: Future<Output = String> + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let text = text.clone();
        async move {
            let answer = match (request.method(), request.uri().path()) {
                (&Method::GET, "/metrics") => {
                    let mut response = Response::new(Full::new(Bytes::from(text().await)));
                    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
                    response.headers_mut().insert(CONTENT_TYPE, kind);
                    response
                }
                _ => {
                    let mut response = Response::new(Full::new(Bytes::from_static(b"GET /metrics\n")));
                    *response.status_mut() = StatusCode::NOT_FOUND;
                    response
                }
            };
            Ok::<_, Infallible>(answer)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await
}
