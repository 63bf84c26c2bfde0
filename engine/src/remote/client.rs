//! The other end: follows a run from another process, for an editor.
//!
//! A named thread holds the connection and makes it anew when it is lost, with longer and longer pauses. Whoever has the
//! [`Client`] never waits: events lie in a queue of bounded length, in which the oldest snapshots give way and are counted.

use std::{
    collections::{BTreeSet, VecDeque},
    io::ErrorKind,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crossbeam::channel::{self, Receiver, Sender, TrySendError};
use serde_json::{Value, json};
use tungstenite::{
    Message, WebSocket,
    client::IntoClientRequest,
    error::Error as WsError,
    http::{HeaderValue, header::AUTHORIZATION},
    protocol::WebSocketConfig,
};

use super::protocol::{self, MAX_FRAME_BYTES};
use crate::{
    control::{RpcError, RpcResult},
    telemetry::Snapshot,
};

/// Snapshots that wait to be looked at.
const MAX_SNAPSHOTS: usize = 64;
/// Requests that wait to be sent.
const MAX_REQUESTS: usize = 256;
/// How long the thread listens before it looks whether there is something to send.
const LISTEN: Duration = Duration::from_millis(10);
/// How long a connection may take to be made, or a message to be sent.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pauses before the first and between later attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What happened at the other end.
#[derive(Clone, Debug)]
pub enum ClientEvent {
    /// The connection is there.
    Connected {
        /// What the run is called.
        name: String,
    },
    /// The connection is gone, or could not be made; it is tried again.
    Lost {
        /// Why.
        why: String,
    },
    /// A step is done.
    Snapshot(Arc<Snapshot>),
    /// So many more snapshots were dropped since the last time, there or here, because somebody was slow.
    Dropped(u64),
    /// The answer to a request.
    Reply {
        /// Number of the request, from [`Client::call`].
        id: u64,
        /// What it came to.
        result: RpcResult,
    },
}

/// A connection to a run.
pub struct Client {
    requests: Option<Sender<(u64, String, Value)>>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    events: Mutex<Events>,
    stop: AtomicBool,
    wake: Arc<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Events {
    queue: VecDeque<ClientEvent>,
    num_snapshots: usize,
    /// Dropped here, not told yet.
    num_dropped: u64,
}

impl Shared {
    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: ClientEvent) {
        self.events().push(event);
        (self.wake)();
    }
}

impl Events {
    fn push(&mut self, event: ClientEvent) {
        if matches!(event, ClientEvent::Snapshot(_)) {
            if self.num_snapshots == MAX_SNAPSHOTS {
                let oldest = self.queue.iter().position(|event| matches!(event, ClientEvent::Snapshot(_)));
                if oldest.and_then(|at| self.queue.remove(at)).is_some() {
                    (self.num_snapshots, self.num_dropped) = (self.num_snapshots - 1, self.num_dropped + 1);
                }
            }
            self.num_snapshots += 1;
        }
        self.queue.push_back(event);
    }

    fn pop(&mut self) -> Option<ClientEvent> {
        if self.num_dropped > 0 {
            return Some(ClientEvent::Dropped(std::mem::take(&mut self.num_dropped)));
        }
        let event = self.queue.pop_front()?;
        self.num_snapshots -= usize::from(matches!(event, ClientEvent::Snapshot(_)));
        Some(event)
    }
}

impl Client {
    /// Follows the run at `url` (`http://host:port`, `ws://host:port` or `host:port`) from now on, with a token if it is to be
    /// changed too. `wake` is called on the client's thread whenever there is an event; it must not block.
    pub fn connect(url: &str, token: Option<String>, wake: Arc<dyn Fn() + Send + Sync>) -> Client {
        let (sender, receiver) = channel::bounded(MAX_REQUESTS);
        let shared = Arc::new(Shared { events: Mutex::default(), stop: AtomicBool::new(false), wake });
        let link = Link { address: address_of(url), token, shared: shared.clone(), requests: receiver };
        let thread = std::thread::Builder::new().name("remote client".into()).spawn(move || link.run());
        let thread = thread.inspect_err(|error| {
            shared.tell(ClientEvent::Lost { why: format!("the operating system gave no thread: {error}") });
        });
        Client { requests: Some(sender), shared, next_id: AtomicU64::new(1), thread: thread.ok() }
    }

    /// The oldest event not yet seen, if any. Never blocks.
    pub fn try_event(&self) -> Option<ClientEvent> {
        self.shared.events().pop()
    }

    /// Asks; the answer will be an event with the number that is returned. Never blocks.
    pub fn call(&self, method: &str, params: Value) -> u64 {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let Some(requests) = &self.requests else { return id };
        let refused = match requests.try_send((id, method.to_owned(), params)) {
            Ok(()) => return id,
            Err(TrySendError::Full(_)) => {
                RpcError::new(RpcError::BUSY, format!("{MAX_REQUESTS} requests wait to be sent already"))
            }
            Err(TrySendError::Disconnected(_)) => RpcError::over(),
        };
        self.shared.events().push(ClientEvent::Reply { id, result: Err(refused) });
        id
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.requests = None;
        // It looks at the flag many times a second, but for a name that takes long to be resolved: not waited for.
        drop(self.thread.take());
    }
}

/// `host:port` of a URL.
fn address_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().unwrap_or_default().to_owned()
}

/// What the thread has.
struct Link {
    address: String,
    token: Option<String>,
    shared: Arc<Shared>,
    requests: Receiver<(u64, String, Value)>,
}

/// Why a connection ended.
enum End {
    /// The client is gone.
    Stopped,
    /// Anything else.
    Lost(String),
}

impl From<WsError> for End {
    fn from(error: WsError) -> Self {
        End::Lost(error.to_string())
    }
}

impl Link {
    fn run(&self) {
        let mut pause = BACKOFF.0;
        let mut told = None;
        while !self.stopped() {
            let connected = self.dial().and_then(|mut socket| {
                (pause, told) = (BACKOFF.0, None);
                self.follow(&mut socket)
            });
            let why = match connected {
                Ok(()) | Err(End::Stopped) => return,
                Err(End::Lost(why)) => why,
            };
            // The same again is no news.
            if told.as_ref() != Some(&why) {
                self.shared.tell(ClientEvent::Lost { why: why.clone() });
                told = Some(why);
            }
            self.refuse_waiting();
            let mut left = pause;
            while !left.is_zero() && !self.stopped() {
                let part = left.min(Duration::from_millis(50));
                std::thread::sleep(part);
                left -= part;
                self.refuse_waiting();
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// Without a connection, requests are answered at once.
    fn refuse_waiting(&self) {
        while let Ok((id, ..)) = self.requests.try_recv() {
            let error = RpcError::new(RpcError::OVER, format!("there is no connection to {}", self.address));
            self.shared.tell(ClientEvent::Reply { id, result: Err(error) });
        }
    }

    fn dial(&self) -> Result<WebSocket<TcpStream>, End> {
        let lost =
            |what: &str, why: &dyn std::fmt::Display| End::Lost(format!("cannot {what} {}: {why}", self.address));
        let addresses: Vec<SocketAddr> =
            self.address.to_socket_addrs().map_err(|error| lost("find", &error))?.collect();
        let mut failure = lost("find", &"it has no address");
        let stream = addresses.iter().find_map(|address| {
            TcpStream::connect_timeout(address, PATIENCE).map_err(|error| failure = lost("reach", &error)).ok()
        });
        let Some(stream) = stream else { return Err(failure) };
        let prepared = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        prepared.map_err(|error| lost("use the connection to", &error))?;
        let mut request = format!("ws://{}/rpc", self.address).into_client_request()?;
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(&format!("Bearer {token}"));
            request.headers_mut().insert(AUTHORIZATION, value.map_err(|error| lost("use the token for", &error))?);
        }
        let config =
            WebSocketConfig::default().max_message_size(Some(MAX_FRAME_BYTES)).max_frame_size(Some(MAX_FRAME_BYTES));
        let (socket, _) =
            tungstenite::client::client_with_config(request, stream, Some(config)).map_err(|error| match error {
                tungstenite::HandshakeError::Failure(WsError::Http(response)) if response.status() == 401 => {
                    lost("enter", &"the token is not that run's; it is in `remote.token` in the run's folder")
                }
                error => lost("speak to", &error),
            })?;
        socket.get_ref().set_read_timeout(Some(LISTEN)).map_err(|error| lost("use the connection to", &error))?;
        Ok(socket)
    }

    /// Follows until something ends it.
    fn follow(&self, socket: &mut WebSocket<TcpStream>) -> Result<(), End> {
        // Numbers of the connection's own two requests; callers' start at 1.
        const STATUS: u64 = 0;
        const SUBSCRIBE: u64 = u64::MAX;
        let mut open = BTreeSet::new();
        let mut num_dropped = 0;
        socket.send(Message::text(protocol::request(STATUS, "run.status", &Value::Null)))?;
        socket.send(Message::text(protocol::request(SUBSCRIBE, "telemetry.subscribe", &json!({}))))?;
        let ended = loop {
            if self.stopped() {
                let _ = socket.close(None);
                break End::Stopped;
            }
            if let Err(end) = self.send_waiting(socket, &mut open) {
                break end;
            }
            match socket.read() {
                Ok(Message::Text(text)) => match protocol::read_response(&text) {
                    Some((STATUS, Ok(status))) => {
                        let name = status["name"].as_str().unwrap_or("a run").to_owned();
                        self.shared.tell(ClientEvent::Connected { name });
                    }
                    Some((STATUS | SUBSCRIBE, Err(error))) => break End::Lost(error.to_string()),
                    Some((SUBSCRIBE, Ok(_))) => {}
                    Some((id, result)) => {
                        open.remove(&id);
                        self.shared.tell(ClientEvent::Reply { id, result });
                    }
                    None => {}
                },
                Ok(Message::Binary(bytes)) => match protocol::decode(&bytes) {
                    Ok(frame) => {
                        if frame.num_dropped > num_dropped {
                            self.shared.tell(ClientEvent::Dropped(frame.num_dropped - num_dropped));
                            num_dropped = frame.num_dropped;
                        }
                        self.shared.tell(ClientEvent::Snapshot(frame.snapshot));
                    }
                    Err(error) => break End::Lost(error.to_string()),
                },
                Ok(Message::Close(close)) => {
                    let reason = close.map(|close| close.reason.to_string()).filter(|reason| !reason.is_empty());
                    break End::Lost(reason.unwrap_or_else(|| "the run closed the connection".into()));
                }
                Ok(_) => {}
                Err(WsError::Io(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(WsError::ConnectionClosed | WsError::AlreadyClosed) => {
                    break End::Lost("the run closed the connection".into());
                }
                Err(error) => break error.into(),
            }
        };
        for id in open {
            let error = RpcError::new(RpcError::OVER, "the connection was lost before an answer came");
            self.shared.tell(ClientEvent::Reply { id, result: Err(error) });
        }
        Err(ended)
    }

    fn send_waiting(&self, socket: &mut WebSocket<TcpStream>, open: &mut BTreeSet<u64>) -> Result<(), End> {
        while let Ok((id, method, params)) = self.requests.try_recv() {
            open.insert(id);
            socket.send(Message::text(protocol::request(id, &method, &params)))?;
        }
        Ok(())
    }
}
