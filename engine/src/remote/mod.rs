//! A run seen from elsewhere: requests as JSON-RPC 2.0 over HTTP or a WebSocket, snapshots as binary frames.

pub mod client;
pub mod protocol;
