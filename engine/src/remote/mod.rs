//! A run seen from elsewhere: requests as JSON-RPC 2.0 over HTTP or a WebSocket, snapshots as binary frames.
//!
//! The server has a thread of its own, and touches the run in two places only: a bounded channel of requests, and a feed that
//! drops the oldest snapshot. Encoding, waiting and all that a peer can do wrong happen on the server's thread.
//!
//! From a shell, in the run's folder, with the address from `remote.json`:
//!
//! ```text
//! curl $URL/rpc -d '{"jsonrpc": "2.0", "id": 1, "method": "rpc.discover"}'
//! curl $URL/rpc -H "Authorization: Bearer $(cat remote.token)" \
//!     -d '{"jsonrpc": "2.0", "id": 1, "method": "run.set", "params": {"path": "lr", "value": 1e-4}}'
//! echo '{"jsonrpc": "2.0", "id": 1, "method": "telemetry.subscribe", "params": {"format": "json"}}' \
//!     | websocat -n ws://$HOST/rpc
//! ```

pub mod access;
pub mod client;
mod http;
mod metrics;
pub mod protocol;
mod rpc;
pub mod server;
mod session;
mod watch;

pub use server::{Server, ServerError, ServerOptions};
