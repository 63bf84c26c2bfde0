//! A serving model over HTTP, as OpenAI's clients ask for it: chats, completions and embeddings, in one piece or as they come; vLLM's
//! `/tokenize`, `/detokenize`, `/health` and `/metrics`; the load of every expert at `/v1/routing`; a page to chat at `/`.
//!
//! ```text
//! request ──> access (key, host, time) ──> fields (checked, by name) ──> tokens ──> Service::submit
//!                                                                                       │  model's thread
//! response <── pieces, or one document <── stream, app <── bounded channel <── Sink <───┘
//! ```
//!
//! The server is up before the model: [`HttpServer::start`], then [`HttpServer::serve`]. A client that goes takes its answers with it; one
//! that is slow costs the memory of its own answer; a full queue is told with 429 and when to come again.
//!
//! From a shell:
//!
//! ```text
//! curl $URL/v1/chat/completions -H 'Content-Type: application/json' \
//!     -d '{"messages": [{"role": "user", "content": "Call me"}], "max_tokens": 20, "stream": true}'
//! ```

mod about;
mod access;
mod app;
pub mod chat;
mod chat_completions;
mod completions;
mod config;
mod embeddings;
mod error;
mod fields;
mod frame;
mod grammar;
mod logprobs;
mod messages;
mod metrics;
mod python_json;
mod random;
mod router;
mod sampling;
mod server;
mod stream;
mod tokenize;
mod tools;
mod usage;

pub use chat::{ChatError, ChatTemplate};
pub use config::{HttpConfig, Loaded};
pub use server::{HttpError, HttpServer, run};
