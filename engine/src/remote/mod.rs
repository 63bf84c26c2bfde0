//! A run seen from elsewhere: requests as JSON-RPC 2.0 over HTTP or a WebSocket, snapshots as binary frames.
//!
//! The server has a thread of its own, and touches the run in two places only: a bounded channel of requests, and a feed that
//! drops the oldest snapshot. Encoding, waiting and all that a peer can do wrong happen on the server's thread.

mod access;
pub mod client;
mod http;
pub mod protocol;
mod rpc;
pub mod server;
mod session;

pub use server::{Server, ServerError, ServerOptions};
