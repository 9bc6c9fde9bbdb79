//! A place between two parts that does to their connections what bad networks do.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;

use crate::system::{Part, System};

/// What happens to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// Nothing.
    Clear,
    /// Each connection ends when so many bytes have passed, wherever that is in a frame.
    Cut(u64),
    /// Connections stay, and nothing passes: neither end learns that the other is gone.
    Silent,
    /// Nobody can connect, and all that are connected end.
    Down,
    /// What a connection's beginning said is said again on another one, by somebody who has recorded it.
    Replayed,
    /// So many bytes a second pass, in each direction of each connection.
    Slow(u64),
    /// Bytes are delayed by up to so many milliseconds, each connection by another time: a later one overtakes an earlier one.
    Delayed(u64),
}

struct Shared {
    to: SocketAddr,
    weather: Mutex<Weather>,
    /// Connections that began under weather before it are ended.
    stopped: AtomicBool,
    passed: AtomicU64,
    connections: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Shared {
    fn weather(&self) -> Weather {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes connections on to an address. Ends when dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens, and passes on to `to`.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start(to: SocketAddr) -> anyhow::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            to,
            weather: Mutex::new(Weather::Clear),
            stopped: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let here = shared.clone();
        std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    if here.stopped.load(Ordering::SeqCst) {
                        return;
                    }
                    let shared = here.clone();
                    std::thread::spawn(move || {
                        // An end of a connection is what this is for.
                        let _ = pass(&shared, stream);
                    });
                }
            })
            .context("start the proxy")?;
        Ok(Proxy { address, shared })
    }

    /// Puts a proxy before a server: the part that connects to it is started again, to go through the proxy.
    ///
    /// # Errors
    /// When the configurations cannot be changed, or a part not started.
    pub fn before(system: &mut System, server: Part) -> anyhow::Result<Proxy> {
        let to = system.listens(server)?;
        let proxy = Proxy::start(to.parse()?)?;
        let port = to.rsplit(':').next().context("a port")?;
        let (part, key) = client_of(server);
        let (wanted, there) = (format!(":{port}\""), proxy.address().to_string());
        system.edit(part, |text| {
            let lines = text.lines().map(|line| match line.starts_with(key) && line.contains(&wanted) {
                true => format!("{key}{there}\"{}", if key.ends_with("[\"") { "]" } else { "" }),
                false => line.to_owned(),
            });
            lines.map(|line| line + "\n").collect()
        })?;
        system.stop(part)?;
        system.start(part)?;
        Ok(proxy)
    }

    /// Back to the way without this proxy.
    ///
    /// # Errors
    /// As [`Proxy::before`].
    pub fn take_away(&self, system: &mut System, server: Part) -> anyhow::Result<()> {
        let (to, there) = (system.listens(server)?, self.address().to_string());
        let (part, _) = client_of(server);
        system.edit(part, |text| text.replace(&there, &to))?;
        system.stop(part)?;
        system.start(part)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the weather, for connections that there are as well.
    pub fn set(&self, weather: Weather) {
        *self.shared.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
        if weather == Weather::Down {
            self.end_all();
        }
    }

    /// How many connections there were.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many bytes have passed.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }

    fn end_all(&self) {
        for stream in self.shared.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may have ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Who connects to a server, and how its configuration begins to say where.
fn client_of(server: Part) -> (Part, &'static str) {
    match server {
        Part::TargetServer => (Part::ProcessServer, "targets = [\""),
        _ => (Part::Agent, "process_server = \""),
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.end_all();
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn pass(shared: &Arc<Shared>, near: TcpStream) -> std::io::Result<()> {
    if shared.weather() == Weather::Down {
        return Ok(());
    }
    let number = shared.connections.fetch_add(1, Ordering::SeqCst);
    let far = TcpStream::connect(shared.to)?;
    let left = Arc::new(AtomicU64::new(match shared.weather() {
        Weather::Cut(bytes) => bytes,
        _ => u64::MAX,
    }));
    {
        let mut open = shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.push(near.try_clone()?);
        open.push(far.try_clone()?);
    }
    let back = {
        let (shared, left) = (shared.clone(), left.clone());
        let (from, to) = (far.try_clone()?, near.try_clone()?);
        std::thread::spawn(move || copy(&shared, from, to, &left, number))
    };
    copy(shared, near, far, &left, number);
    // Ends with the other direction.
    let _ = back.join();
    Ok(())
}

fn copy(shared: &Arc<Shared>, mut from: TcpStream, mut to: TcpStream, left: &AtomicU64, number: u64) {
    let mut buffer = [0; 16 * 1024];
    let mut recorded = Vec::new();
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        while shared.weather() == Weather::Silent && !shared.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        match shared.weather() {
            Weather::Delayed(most) => {
                // Connections differ; a seed is not needed, as every number comes.
                std::thread::sleep(Duration::from_millis(number.wrapping_mul(37) % most.max(1)));
            }
            Weather::Slow(bytes) => {
                std::thread::sleep(Duration::from_secs_f64(count as f64 / bytes.max(1) as f64));
            }
            Weather::Replayed if recorded.len() < 64 * 1024 => {
                recorded.extend_from_slice(&buffer[..count]);
                if let Ok(mut other) = TcpStream::connect(shared.to) {
                    // Refused, somewhere on the way.
                    let _ = other.write_all(&recorded);
                }
            }
            _ => {}
        }
        let may = left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(count as u64)));
        let may = may.unwrap_or(0).min(count as u64) as usize;
        if to.write_all(&buffer[..may]).is_err() {
            break;
        }
        shared.passed.fetch_add(may as u64, Ordering::SeqCst);
        if may < count {
            break; // in the middle of something
        }
    }
    // The other end may have ended.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
