//! What goes over the wire.
//!
//! Requests and answers are JSON-RPC 2.0 as text. Snapshots are binary frames: a byte that says which version of this format
//! follows, how many were missed, and the snapshot as [`crate::telemetry::bytes`] writes it.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    control::{RpcError, RpcResult},
    telemetry::{
        Snapshot,
        bytes::{Damaged, from_bytes, to_bytes},
    },
};

/// Version of the frames; the first byte of each.
pub const VERSION: u8 = 1;

/// Longest message that either side takes, in bytes; frames may be longer.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Longest frame that a client takes, in bytes: a step of some million tasks.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// A frame is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It is of another version.
    #[error("expected frames of version {VERSION}, found version {0}; use the same version of Hadal on both sides")]
    Version(u8),
    /// It cannot be read.
    #[error("the frame is damaged: {0}")]
    Damaged(#[from] Damaged),
}

/// A snapshot on its way, with how many were dropped before it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Snapshots that this listener missed so far because it was slow.
    pub num_dropped: u64,
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
}

/// The part of a frame that is the same for all listeners; [`frame`] completes it.
///
/// # Errors
/// None that a snapshot can cause; the encoder's.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, FrameError> {
    Ok(to_bytes(snapshot)?)
}

/// A whole frame: the version, how many snapshots this listener missed so far, and the part from [`encode`].
pub fn frame(num_dropped: u64, encoded: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + encoded.len());
    frame.push(VERSION);
    frame.extend(num_dropped.to_le_bytes());
    frame.extend(encoded);
    frame
}

/// Version and number of missed snapshots.
const HEADER_BYTES: usize = 9;

/// Reads a frame.
///
/// # Errors
/// If it is of another version or damaged.
pub fn decode(frame: &[u8]) -> Result<Frame, FrameError> {
    match frame.first() {
        None => return Err(Damaged("it is empty".into()).into()),
        Some(&VERSION) => {}
        Some(&other) => return Err(FrameError::Version(other)),
    }
    let Some((header, encoded)) = frame.split_at_checked(HEADER_BYTES) else {
        return Err(Damaged(format!("it has {} bytes", frame.len())).into());
    };
    let num_dropped = u64::from_le_bytes(header[1..].try_into().unwrap_or_default());
    Ok(Frame { num_dropped, snapshot: Arc::new(from_bytes(encoded)?) })
}

/// A request as text.
pub fn request(id: u64, method: &str, params: &Value) -> String {
    json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string()
}

/// An answer as JSON.
pub fn response(id: &Value, result: RpcResult) -> Value {
    match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
    }
}

/// Reads an answer: which request it is to, and what it came to. `None` if it is none.
pub fn read_response(text: &str) -> Option<(u64, RpcResult)> {
    #[derive(Deserialize)]
    struct Response {
        id: u64,
        #[serde(default)]
        result: Value,
        error: Option<RpcError>,
    }
    let Response { id, result, error } = serde_json::from_str(text).ok()?;
    Some((id, error.map_or(Ok(result), Err)))
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
