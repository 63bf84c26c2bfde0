//! Connections: taken up to a number, each with limits of time, and ended in good order.
//!
//! An end has three parts: nobody new comes in, and the model takes no more requests; answers that run may go on for a while; what is
//! left then is told so and cut.

use std::{future::Future, io, net::SocketAddr, pin::pin, sync::Arc, thread::JoinHandle, time::Duration};

use axum::Extension;
use engine::remote::access;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    app::App,
    config::{HttpConfig, Loaded},
    error::ApiError,
    metrics::Metrics,
    router,
};

/// How long the head of a request may take, and a connection that asks nothing may stay.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer's end may take to be read once its time is over.
const READ_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client that is refused may go on sending.
const LINGER: Duration = Duration::from_secs(1);
/// How long connections may take to say that they were cut.
const CUT_PATIENCE: Duration = Duration::from_secs(1);

/// Connections that are being told that there are too many.
const MAX_REFUSALS: usize = 64;

/// A server that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Not an address, or one that is taken.
    #[error("cannot listen on {address}: {source}; choose another port, 0 for any that is free")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The configuration cannot be served.
    #[error("{0}")]
    Config(String),
    /// The system does not give what a server needs.
    #[error("cannot serve: {0}")]
    System(#[from] io::Error),
}

/// What the requests of a connection know of it.
pub(super) struct Connection {
    pub(super) is_loopback: bool,
    /// When it is closed, whatever happens on it.
    until: watch::Sender<Option<Instant>>,
}

impl Connection {
    /// A request began that must end by then.
    pub(super) fn begin(&self, deadline: Instant) {
        self.until.send_replace(Some(deadline + READ_PATIENCE));
    }
}

/// Serves until `shutdown` comes, and then until what runs has ended, or `config.drain` is over. The model may come later than
/// the first request.
///
/// # Errors
/// A configuration that cannot be served.
pub async fn run(
    listener: TcpListener,
    config: HttpConfig,
    model: watch::Receiver<Option<Arc<Loaded>>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), HttpError> {
    let (cut, is_cut) = watch::channel(false);
    let metrics = Arc::new(Metrics::new(&config.metrics_prefix, &config.model_name));
    let (max_connections, drain) = (config.max_connections.clamp(1, Semaphore::MAX_PERMITS), config.drain);
    let app = Arc::new(App { config, model: model.clone(), metrics, cut: is_cut });
    let router = router::router(app).map_err(HttpError::Config)?;
    let (draining, is_draining) = watch::channel(false);
    let places = Arc::new(Semaphore::new(max_connections));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        let Ok((stream, _)) = accepted else {
            // Too many open files, or a peer that went: neither is helped by asking again at once.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        match places.clone().try_acquire_owned() {
            Ok(place) => drop(tokio::spawn(converse(stream, router.clone(), is_draining.clone(), place))),
            Err(_) => {
                if let Ok(place) = refusals.clone().try_acquire_owned() {
                    drop(tokio::spawn(refuse(stream, place)));
                }
            }
        }
    }
    drop(listener);
    draining.send_replace(true);
    if let Some(loaded) = &*model.borrow() {
        loaded.service.close();
    }
    let all = max_connections as u32;
    if timeout(drain, places.acquire_many(all)).await.is_err() {
        cut.send_replace(true);
        let _ = timeout(CUT_PATIENCE, places.acquire_many(all)).await;
    }
    Ok(())
}

async fn converse(
    stream: TcpStream,
    router: axum::Router,
    mut is_draining: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    // Tokens are small, and awaited.
    let _ = stream.set_nodelay(true);
    let is_loopback = stream.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let (until, mut is_until) = watch::channel(None);
    let connection = Arc::new(Connection { is_loopback, until });
    let service = TowerToHyperService::new(router.layer(Extension(connection)));
    let mut http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    let mut drains = false;
    let is_over = loop {
        let end = *is_until.borrow_and_update();
        tokio::select! {
            done = std::future::poll_fn(|context| http.poll_without_shutdown(context)) => break done.is_ok(),
            Ok(()) = is_until.changed() => {}
            () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => break false,
            Ok(()) = is_draining.changed(), if !drains => {
                drains = true;
                std::pin::Pin::new(&mut http).graceful_shutdown();
            }
        }
    };
    if is_over {
        linger(http.into_parts().io.into_inner()).await;
    }
}

/// Says that nothing more comes, and listens for a moment: a connection that is closed on a client that still sends loses the answer
/// on its way.
async fn linger(mut stream: TcpStream) {
    let rest = async {
        stream.shutdown().await?;
        let mut ignored = vec![0; 16 << 10];
        while stream.read(&mut ignored).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = timeout(LINGER, rest).await;
}

/// Tells a client that there is no place.
async fn refuse(mut stream: TcpStream, _place: OwnedSemaphorePermit) {
    let error = ApiError::unavailable("too_many_connections", "too many connections; try again in a moment");
    let body = error.body().to_string();
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    if let Ok(Ok(())) = timeout(LINGER, stream.write_all(answer.as_bytes())).await {
        linger(stream).await;
    }
}

/// A server on a thread of its own, for a program that is not asynchronous. It ends in good order when it is dropped.
pub struct HttpServer {
    address: SocketAddr,
    model: watch::Sender<Option<Arc<Loaded>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), HttpError>>>,
}

impl HttpServer {
    /// Listens; who asks the model, or for its `/health`, is told to wait until [`HttpServer::serve`].
    ///
    /// # Errors
    /// An address that is not to be had, or a configuration that cannot be served.
    pub fn start(address: SocketAddr, config: HttpConfig) -> Result<Self, HttpError> {
        super::access::cors(&config.cors_origins).map_err(HttpError::Config)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(2)
            .thread_name("http-aside")
            .build()?;
        let listener = runtime.block_on(TcpListener::bind(address));
        let listener = listener.map_err(|source| HttpError::Bind { address, source })?;
        let address = listener.local_addr()?;
        let (model, later) = watch::channel(None);
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("http".into()).spawn(move || {
            let shutdown = async {
                let _ = stopped.await;
            };
            let ended = runtime.block_on(run(listener, config, later, shutdown));
            // What still waits for a peer is given up.
            runtime.shutdown_background();
            ended
        })?;
        Ok(HttpServer { address, model, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where a client of this machine finds it.
    pub fn url(&self) -> String {
        access::url(self.address)
    }

    /// The model is there.
    pub fn serve(&self, loaded: Loaded) {
        self.model.send_replace(Some(Arc::new(loaded)));
    }

    /// Ends in good order: no new requests; running answers go on for `config.drain` at most.
    ///
    /// # Errors
    /// What went wrong while it ran.
    pub fn stop(mut self) -> Result<(), HttpError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), HttpError> {
        self.stop = None;
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|_| Err(HttpError::Config("the server's thread panicked".into())))
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // Who wants to know what went wrong says `stop`.
        let _ = self.end();
    }
}
