//! The server: one thread that listens, with a limit to everything that a peer can make it hold.
//!
//! A connection that is not upgraded serves one request and has a limit of time for each part of it. Beyond a number of
//! connections, more are told to come later and closed.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use axum::{Extension, body::Bytes};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    access::{self, Files, Token},
    http, protocol,
};
use crate::{control::ControlHandle, telemetry::Snapshot};

/// Connections at one time.
const MAX_CONNECTIONS: usize = 64;
/// Connections that are being told that there are too many.
const MAX_REFUSALS: usize = 64;
/// How long the head of a request may take.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may take to be read.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// How long connections may take to end when the run is over.
const END_PATIENCE: Duration = Duration::from_millis(500);
/// What the system keeps of what a peer has not taken yet: a slow peer is to see recent steps, not those of a minute ago.
const SEND_BUFFER_BYTES: u32 = 256 << 10;

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 21\r\n\
    connection: close\r\n\r\ntoo many connections\n";

/// What a server serves, and where.
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The run's folder, for the files that say where the server is and what its token is.
    pub dir: PathBuf,
    /// The way to the run.
    pub handle: ControlHandle,
}

/// A server that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}; choose another (`remote.bind` of a scene, `--remote` of a server), port 0 for any that is free"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The files cannot be written.
    #[error("cannot write where the server is to {}: {source}", dir.display())]
    Files {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The system does not give what a server needs.
    #[error("cannot start the server: {0}")]
    System(#[from] io::Error),
}

/// A server, until it is dropped.
pub struct Server {
    address: SocketAddr,
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _files: Files,
}

/// What all connections have.
pub(super) struct Shared {
    pub(super) handle: ControlHandle,
    pub(super) token: Token,
    pub(super) is_loopback: bool,
    pub(super) stopped: watch::Receiver<()>,
    /// What `GET /metrics` said last.
    pub(super) metrics: Mutex<Option<String>>,
    /// The snapshot that was encoded last, for other listeners.
    last: Mutex<Option<(Arc<Snapshot>, Bytes)>>,
}

/// What a connection holds as long as it lasts.
pub(super) struct Connection {
    _place: OwnedSemaphorePermit,
    /// The answer is ready, and is to be read.
    pub(super) answered: Notify,
}

impl Shared {
    /// A snapshot as all listeners get it; none if it cannot be encoded.
    pub(super) fn encoded(&self, snapshot: &Arc<Snapshot>) -> Option<Bytes> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, bytes)) = &*last
            && Arc::ptr_eq(known, snapshot)
        {
            return Some(bytes.clone());
        }
        let bytes = Bytes::from(protocol::encode(snapshot).ok()?);
        *last = Some((snapshot.clone(), bytes.clone()));
        Some(bytes)
    }
}

impl Server {
    /// Listens, makes a token, and writes both down.
    ///
    /// # Errors
    /// If the address is not to be had, or a file cannot be written.
    pub fn start(options: ServerOptions) -> Result<Self, ServerError> {
        let ServerOptions { bind, dir, handle } = options;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let listener = {
            let _inside = runtime.enter();
            listen(bind).map_err(|source| ServerError::Bind { address: bind, source })?
        };
        let address = listener.local_addr()?;
        let token = Token::new()?;
        let files =
            Files::write(&dir, address, &token).map_err(|source| ServerError::Files { dir: dir.clone(), source })?;
        let (stop, stopped) = watch::channel(());
        let is_loopback = address.ip().is_loopback();
        let shared =
            Arc::new(Shared { handle, token, is_loopback, stopped, metrics: Mutex::default(), last: Mutex::default() });
        let thread = std::thread::Builder::new().name("remote".into()).spawn(move || {
            runtime.block_on(serve(listener, shared));
            // What still waits for a peer is given up.
            runtime.shutdown_background();
        })?;
        Ok(Server { address, stop: Some(stop), thread: Some(thread), _files: files })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where a client of this machine finds it.
    pub fn url(&self) -> String {
        access::url(self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It ends within `END_PATIENCE`; that it panicked changes nothing here.
            let _ = thread.join();
        }
    }
}

fn listen(bind: SocketAddr) -> io::Result<TcpListener> {
    let socket = if bind.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(bind)?;
    socket.listen(1024)
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    let router = http::router(&shared);
    let mut stopped = shared.stopped.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => break,
        };
        let Ok((stream, _)) = accepted else {
            // Too many open files, or a peer that went: neither is helped by asking again at once.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let connection = Arc::new(Connection { _place: place, answered: Notify::new() });
                tokio::spawn(converse(stream, router.clone(), connection));
            }
            Err(_) => {
                if let Ok(place) = refusals.clone().try_acquire_owned() {
                    tokio::spawn(refuse(stream, place));
                }
            }
        }
    }
    drop(listener);
    // Sessions see the end by themselves.
    let _ = timeout(END_PATIENCE, places.acquire_many(MAX_CONNECTIONS as u32)).await;
}

async fn converse(stream: TcpStream, router: axum::Router, connection: Arc<Connection>) {
    // Answers are small, and awaited.
    let _ = stream.set_nodelay(true);
    let router = router.layer(Extension(connection.clone()));
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let not_read = async {
        connection.answered.notified().await;
        sleep(READ_PATIENCE).await;
    };
    tokio::select! {
        // Whatever went wrong, went wrong at the other end.
        _ = http => {}
        () = not_read => {}
    }
}

/// Says that there are too many, and listens for a moment: closed at once, a connection may lose what was said.
async fn refuse(mut stream: TcpStream, place: OwnedSemaphorePermit) {
    let told = async {
        stream.write_all(TOO_MANY).await?;
        stream.shutdown().await?;
        let mut ignored = [0; 1024];
        while stream.read(&mut ignored).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = timeout(Duration::from_millis(500), told).await;
    drop(place);
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
