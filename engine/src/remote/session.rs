//! One WebSocket: requests and answers as text, snapshots as binary frames or as text.
//!
//! A peer that is slow misses the oldest snapshots, which wait in its feed's bounded channel; one that takes nothing at all for
//! some seconds, or does not answer a ping, is let go.

use std::{sync::Arc, time::Duration};

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, close_code};
use crossbeam::channel::TryRecvError;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{
    protocol, rpc,
    server::{Connection, Shared},
    watch::{self, Watches},
};
use crate::{
    control::{ControlHandle, RpcError, RpcResult, params_of},
    telemetry::{Receiver, Snapshot},
};

/// Snapshots that wait for a slow peer.
const MAX_WAITING: usize = 8;
/// Requests of one peer that wait for answers.
const MAX_OPEN: usize = 64;
/// How long a peer may take nothing of what is sent.
const SEND_PATIENCE: Duration = Duration::from_secs(10);
/// Time between pings.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Pings without any sign of life.
const MAX_UNANSWERED: u32 = 3;

/// How snapshots are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    /// All of it, as frames.
    #[default]
    Binary,
    /// Scalars and distributions, as text.
    Json,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubscribeParams {
    #[serde(default)]
    format: Format,
}

/// What a peer gets of the run.
struct Subscription {
    receiver: Receiver,
    format: Format,
}

struct Session {
    socket: WebSocket,
    shared: Arc<Shared>,
    handle: ControlHandle,
    subscription: Option<Subscription>,
    /// There may be a snapshot.
    ready: Arc<Notify>,
    answers: mpsc::Sender<String>,
    watches: Watches,
}

/// The connection is over.
struct Over;

const UNWATCH: &str = "rpc.unwatch";

/// Whether a method is for the connection itself.
fn is_own(method: &str) -> bool {
    method.starts_with("telemetry.") || method.ends_with(watch::SUFFIX) || method == UNWATCH
}

/// Speaks with a peer until it goes, is let go, or the run is over.
pub(super) async fn run(
    socket: WebSocket,
    shared: Arc<Shared>,
    handle: ControlHandle,
    connection: Arc<Connection>,
    format: Option<Format>,
) {
    let (answers, mut answered) = mpsc::channel(MAX_OPEN);
    let ready = Arc::new(Notify::new());
    let mut stopped = shared.stopped.clone();
    let mut session = Session {
        socket,
        shared,
        handle,
        subscription: None,
        ready: ready.clone(),
        answers,
        watches: Watches::default(),
    };
    session.subscription = format.map(|format| session.subscribe(format));
    let mut num_unanswered = 0;
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.reset();
    loop {
        let done = tokio::select! {
            message = session.socket.recv() => {
                num_unanswered = 0;
                match message {
                    Some(Ok(message)) => session.receive(message).await,
                    Some(Err(_)) | None => Err(Over),
                }
            }
            () = ready.notified() => session.send_snapshot().await,
            Some(text) = answered.recv() => session.send(Message::text(text)).await,
            _ = pings.tick() => {
                num_unanswered += 1;
                if num_unanswered > MAX_UNANSWERED { Err(Over) } else { session.send(Message::Ping("".into())).await }
            }
            _ = stopped.changed() => session.finish().await,
        };
        if done.is_err() {
            break;
        }
    }
    drop(connection);
}

impl Session {
    fn subscribe(&self, format: Format) -> Subscription {
        let ready = self.ready.clone();
        let wake = Arc::new(move || ready.notify_one());
        let receiver = self.handle.feed().subscribe_and_wake(MAX_WAITING, Some(wake));
        // If the run is over already, it is found out at once.
        self.ready.notify_one();
        Subscription { receiver, format }
    }

    async fn send(&mut self, message: Message) -> Result<(), Over> {
        match timeout(SEND_PATIENCE, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Over),
        }
    }

    /// Sends what is left, then the end.
    async fn finish(&mut self) -> Result<(), Over> {
        for _ in 0..=MAX_WAITING {
            self.send_snapshot().await?;
        }
        self.say_goodbye().await
    }

    async fn say_goodbye(&mut self) -> Result<(), Over> {
        let reason = Utf8Bytes::from_static("the run is over");
        let close = Message::Close(Some(CloseFrame { code: close_code::AWAY, reason }));
        let _ = timeout(Duration::from_secs(1), self.socket.send(close)).await;
        Err(Over)
    }

    async fn receive(&mut self, message: Message) -> Result<(), Over> {
        let text = match message {
            Message::Text(text) => text,
            Message::Binary(_) => {
                let error = RpcError::new(RpcError::INVALID_REQUEST, "expected a request as text, found binary data");
                return self.send_json(&protocol::response(&Value::Null, Err(error))).await;
            }
            Message::Ping(_) | Message::Pong(_) => return Ok(()),
            Message::Close(_) => return Err(Over),
        };
        let value = match rpc::parse(text.as_bytes()) {
            Ok(value) => value,
            Err(answer) => return self.send_json(&answer).await,
        };
        if value.get("method").and_then(Value::as_str).is_some_and(is_own) {
            return match rpc::call(value) {
                Ok(call) => self.own(call).await,
                Err(answer) => self.send_json(&answer).await,
            };
        }
        let Ok(permit) = self.answers.clone().try_reserve_owned() else {
            let message = format!("{MAX_OPEN} requests of this connection wait for answers already");
            let error = RpcError::new(RpcError::BUSY, message);
            let id = value.get("id").cloned().unwrap_or(Value::Null);
            return self.send_json(&protocol::response(&id, Err(error))).await;
        };
        let handle = self.handle.clone();
        tokio::spawn(async move {
            if let Some(answer) = rpc::respond(&handle, value).await {
                permit.send(answer.to_string());
            }
        });
        Ok(())
    }

    async fn send_json(&mut self, value: &Value) -> Result<(), Over> {
        self.send(Message::text(value.to_string())).await
    }

    /// What concerns this connection and not the run.
    async fn own(&mut self, rpc::Call { id, method, params }: rpc::Call) -> Result<(), Over> {
        let result = match method.strip_suffix(watch::SUFFIX) {
            Some(watched) => {
                let begun = self.watches.begin(&self.handle, id.clone(), watched, params, self.answers.clone());
                let Err(error) = begun else { return Ok(()) };
                Err(error)
            }
            None if method == UNWATCH => self.watches.end(&params),
            None => self.telemetry(&method, &params),
        };
        match id {
            Some(id) => self.send_json(&protocol::response(&id, result)).await,
            None => Ok(()),
        }
    }

    fn telemetry(&mut self, method: &str, params: &Value) -> RpcResult {
        match method {
            "telemetry.subscribe" => {
                let SubscribeParams { format } = params_of(params)?;
                self.subscription = Some(self.subscribe(format));
                Ok(json!({ "version": protocol::VERSION, "max_waiting": MAX_WAITING }))
            }
            "telemetry.unsubscribe" => {
                self.subscription = None;
                Ok(Value::Null)
            }
            _ => {
                let message = format!(
                    "there is no method `{method}`; there are `telemetry.subscribe` and `telemetry.unsubscribe`"
                );
                Err(RpcError::new(RpcError::METHOD_NOT_FOUND, message))
            }
        }
    }

    /// Sends the oldest snapshot that waits, if one does.
    async fn send_snapshot(&mut self) -> Result<(), Over> {
        let Some(Subscription { receiver, format }) = &self.subscription else { return Ok(()) };
        let snapshot = match receiver.try_recv() {
            Ok(snapshot) => snapshot,
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => return self.say_goodbye().await,
        };
        let num_dropped = receiver.num_dropped();
        let message = match format {
            Format::Binary => match self.shared.encoded(&snapshot) {
                Some(encoded) => Message::Binary(protocol::frame(num_dropped, &encoded).into()),
                None => return Ok(()),
            },
            Format::Json => Message::text(as_json(num_dropped, &snapshot).to_string()),
        };
        // There may be another.
        self.ready.notify_one();
        self.send(message).await
    }
}

/// A snapshot as a notification, without its spans.
fn as_json(num_dropped: u64, snapshot: &Snapshot) -> Value {
    let scalars: serde_json::Map<String, Value> =
        snapshot.scalars.iter().map(|(name, value)| (name.clone(), (*value).into())).collect();
    let histograms: serde_json::Map<String, Value> =
        snapshot.histograms.iter().map(|(name, values)| (name.clone(), values.clone().into())).collect();
    json!({
        "jsonrpc": "2.0",
        "method": "telemetry.step",
        "params": {
            "step": snapshot.step,
            "num_dropped": num_dropped,
            "num_tasks": snapshot.spans.len(),
            "scalars": scalars,
            "histograms": histograms,
        },
    })
}
