//! Requests that are answered again: `world.get+watch` is answered at once, and after each step in which its answer has changed, under
//! the same id, as the Bevy Remote Protocol does. A watch looks as any request does, between two steps, and can change nothing.

use std::{collections::BTreeMap, sync::Arc};

use crossbeam::channel::TryRecvError;
use serde_json::Value;
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
};

use super::{protocol::response, rpc};
use crate::control::{ControlHandle, RpcError, RpcResult};

/// What a method's name ends with if it is to be answered again.
pub(super) const SUFFIX: &str = "+watch";
/// Watches of one connection.
const MAX_WATCHES: usize = 16;

/// The watches of a connection, by the text of their ids; they end with it.
#[derive(Default)]
pub(super) struct Watches(BTreeMap<String, AbortHandle>);

impl Drop for Watches {
    fn drop(&mut self) {
        self.0.values().for_each(AbortHandle::abort);
    }
}

impl Watches {
    /// Begins one; the error says why not.
    pub(super) fn begin(
        &mut self,
        handle: &ControlHandle,
        id: Option<Value>,
        method: &str,
        params: Value,
        answers: mpsc::Sender<String>,
    ) -> Result<(), RpcError> {
        let Some(id) = id else {
            return Err(RpcError::new(RpcError::INVALID_REQUEST, "expected an `id`: each answer names it"));
        };
        self.0.retain(|_, watch| !watch.is_finished());
        if self.0.len() >= MAX_WATCHES {
            let message = format!("{MAX_WATCHES} watches of this connection already; end one with `rpc.unwatch`");
            return Err(RpcError::new(RpcError::BUSY, message));
        }
        if self.0.contains_key(&id.to_string()) {
            return Err(RpcError::new(RpcError::INVALID_REQUEST, format!("there is a watch with the id {id} already")));
        }
        let task = tokio::spawn(watch(handle.read_only(), id.clone(), method.to_owned(), params, answers));
        self.0.insert(id.to_string(), task.abort_handle());
        Ok(())
    }

    /// `rpc.unwatch`.
    pub(super) fn end(&mut self, params: &Value) -> RpcResult {
        let id = params.get("id").unwrap_or(&Value::Null);
        match self.0.remove(&id.to_string()) {
            Some(watch) => {
                watch.abort();
                Ok(Value::Null)
            }
            None => Err(RpcError::params(format!("expected the `id` of a watch of this connection, found {id}"))),
        }
    }
}

async fn watch(handle: ControlHandle, id: Value, method: String, params: Value, answers: mpsc::Sender<String>) {
    let ready = Arc::new(Notify::new());
    let wake = ready.clone();
    // One waits at most: what matters is that a step is done, not which.
    let steps = handle.feed().subscribe_and_wake(1, Some(Arc::new(move || wake.notify_one())));
    let mut last = None;
    loop {
        let result = rpc::ask(&handle, &method, params.clone()).await;
        let failed = result.is_err();
        if last.as_ref() != Some(&result) {
            if answers.send(response(&id, result.clone()).to_string()).await.is_err() {
                return;
            }
            last = Some(result);
        }
        if failed {
            return;
        }
        loop {
            ready.notified().await;
            match steps.skip() {
                Ok(()) => break,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }
}
