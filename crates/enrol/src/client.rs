//! The way to the config server's API: HTTPS, one connection that is kept while it lasts.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use control::fleet::{Login, Problem, Session};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, HeaderMap, SET_COOKIE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use wire::{Credentials, WebTrust, web_client};

use crate::EnrolError;
use crate::url::ServerUrl;

/// How long TCP and TLS may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long an answer may take.
pub const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);
/// The largest answer, in bytes. A larger one is refused.
pub const REPLY_BYTES_MAX: usize = 32 * 1024 * 1024;

type Sending = SendRequest<Full<Bytes>>;
/// An answer: status, head, body.
type Heard = (StatusCode, HeaderMap, Bytes);

/// A client of one config server.
pub struct Client {
    server: ServerUrl,
    config: Arc<rustls::ClientConfig>,
    name: ServerName<'static>,
    token: Option<String>,
    session: std::sync::Mutex<Option<OpenSession>>,
    connection: Mutex<Option<Sending>>,
}

/// The secrets of a session that began with a password.
struct OpenSession {
    cookie: String,
    csrf: String,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client of {}", self.server)
    }
}

impl Client {
    /// A client; nothing is connected yet. With credentials it shows a certificate, with a token it sends that.
    ///
    /// # Errors
    /// When the authority's certificate cannot be used.
    pub fn new(
        server: ServerUrl,
        trust: &WebTrust,
        credentials: Option<&Credentials>,
        token: Option<String>,
    ) -> Result<Client, EnrolError> {
        let (config, name) = web_client(trust, credentials)
            .map_err(|reason| EnrolError::Tls { server: server.to_string(), reason })?;
        Ok(Client {
            server,
            config,
            name,
            token,
            session: std::sync::Mutex::default(),
            connection: Mutex::default(),
        })
    }

    /// Where the config server is.
    pub fn server(&self) -> &ServerUrl {
        &self.server
    }

    /// Begins a session with a password; what follows is done in it.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn login(&self, login: &Login) -> Result<Session, EnrolError> {
        let body = serde_json::to_vec(login).map_err(|error| self.answer(error))?;
        let (status, head, bytes) = self.asked(Method::POST, "/login", Some(body.into())).await?;
        let session: Session = self.read(status, &bytes)?;
        let cookie = head.get(SET_COOKIE).and_then(|cookie| cookie.to_str().ok());
        let cookie = cookie
            .and_then(|cookie| cookie.split(';').next())
            .ok_or_else(|| self.answer("it set no cookie"))?;
        let open = OpenSession { cookie: cookie.to_owned(), csrf: session.csrf.clone() };
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(open);
        Ok(session)
    }

    /// Asks for something.
    ///
    /// # Errors
    /// When it is not reached, does not do it, or answers something else.
    pub async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R, EnrolError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// Has something done.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<R, EnrolError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// One request. An answer without a body reads as JSON's null.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<R, EnrolError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| self.answer(error))?;
        tracing::debug!(%method, path, "ask the config server");
        let (status, _, bytes) = self.asked(method, path, body.map(Bytes::from)).await?;
        self.read(status, &bytes)
    }

    async fn asked(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Heard, EnrolError> {
        let asked = timeout(REQUEST_TIME_MAX, self.exchange(method, path, body)).await;
        let late = || self.unreachable(format!("no answer within {} s", REQUEST_TIME_MAX.as_secs()));
        asked.unwrap_or_else(|_| Err(late()))
    }

    fn read<R: DeserializeOwned>(&self, status: StatusCode, bytes: &[u8]) -> Result<R, EnrolError> {
        if status.is_success() {
            let text = if bytes.is_empty() { b"null" } else { bytes };
            return serde_json::from_slice(text).map_err(|error| self.answer(error));
        }
        match serde_json::from_slice::<Problem>(bytes) {
            Ok(problem) => Err(EnrolError::Problem(Box::new(problem))),
            Err(_) => Err(self.answer(format!("it answered {status}, without a reason"))),
        }
    }

    /// A stream of server-sent events, frame by frame, until `each` says that it is enough or the stream ends.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn follow(&self, path: &str, mut each: impl FnMut(&str) -> bool) -> Result<(), EnrolError> {
        let mut sending = self.connect().await?;
        let request = self.request(Method::GET, path, None)?;
        let response = sending.send_request(request).await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = self.collect(body).await?;
            return Err(match serde_json::from_slice::<Problem>(&bytes) {
                Ok(problem) => EnrolError::Problem(Box::new(problem)),
                Err(_) => self.answer(format!("it answered {status}, without a reason")),
            });
        }
        // Bytes, for a character may be cut by the end of a frame.
        let mut text: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.unreachable(error))?;
            let Some(data) = frame.data_ref() else { continue };
            text.extend_from_slice(data);
            if text.len() > REPLY_BYTES_MAX {
                return Err(self.answer("an event has no end"));
            }
            while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
                let rest = text.split_off(end + 2);
                let event = String::from_utf8(std::mem::replace(&mut text, rest));
                let event = event.map_err(|error| self.answer(error))?;
                let data = event.lines().filter_map(|line| line.strip_prefix("data:"));
                let data =
                    data.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect::<Vec<_>>().join("\n");
                if !data.is_empty() && !each(&data) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Heard, EnrolError> {
        // One request at a time: parts have one thing to say.
        let mut kept = self.connection.lock().await;
        if let Some(mut sending) = kept.take()
            && sending.ready().await.is_ok()
        {
            let request = self.request(method.clone(), path, body.clone())?;
            match sending.send_request(request).await {
                Ok(response) => {
                    let answer = self.answer_of(response).await?;
                    *kept = Some(sending);
                    return Ok(answer);
                }
                // The server closed what was idle; whether it has read the request is not known.
                Err(error) if method == Method::GET || error.is_canceled() => {}
                Err(error) => return Err(self.unreachable(error)),
            }
        }
        let mut sending = self.connect().await?;
        let request = self.request(method, path, body)?;
        let response = sending.send_request(request).await.map_err(|error| self.unreachable(error))?;
        let answer = self.answer_of(response).await?;
        *kept = Some(sending);
        Ok(answer)
    }

    async fn answer_of(&self, response: Response<Incoming>) -> Result<Heard, EnrolError> {
        let (head, body) = response.into_parts();
        Ok((head.status, head.headers, self.collect(body).await?))
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, EnrolError> {
        let collected = Limited::new(body, REPLY_BYTES_MAX).collect().await;
        collected.map(|body| body.to_bytes()).map_err(|error| self.unreachable(error))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Request<Full<Bytes>>, EnrolError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header(HOST, self.server.address())
            .header(ACCEPT, "application/json, text/event-stream, application/problem+json");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(session) = &*self.session.lock().unwrap_or_else(PoisonError::into_inner) {
            request = request.header(COOKIE, &session.cookie).header("x-seawall-csrf", &session.csrf);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(body.unwrap_or_default())).map_err(|error| self.answer(error))
    }

    async fn connect(&self) -> Result<Sending, EnrolError> {
        let address = self.server.address();
        let connect = async {
            let stream = TcpStream::connect(&address).await.map_err(|error| self.unreachable(error))?;
            stream.set_nodelay(true).map_err(|error| self.unreachable(error))?;
            let connector = TlsConnector::from(self.config.clone());
            connector.connect(self.name.clone(), stream).await.map_err(|error| self.tls(&error))
        };
        let stream = timeout(CONNECT_TIME_MAX, connect).await.unwrap_or_else(|_| {
            Err(self.unreachable(format!("no answer within {} s", CONNECT_TIME_MAX.as_secs())))
        })?;
        let (sending, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.unreachable(error))?;
        tokio::spawn(async move {
            // Whoever waits for an answer hears of it.
            let _ = connection.await;
        });
        Ok(sending)
    }

    fn tls(&self, error: &io::Error) -> EnrolError {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => EnrolError::Tls { server: self.server.to_string(), reason: tls.to_string() },
            None => self.unreachable(error),
        }
    }

    fn unreachable(&self, reason: impl std::fmt::Display) -> EnrolError {
        EnrolError::Unreachable { server: self.server.to_string(), reason: reason.to_string() }
    }

    fn answer(&self, reason: impl std::fmt::Display) -> EnrolError {
        EnrolError::Answer { server: self.server.to_string(), reason: reason.to_string() }
    }
}
