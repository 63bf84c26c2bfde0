//! The server against a model that is none: each way, shape, error and limit, over real connections.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fake_model/mod.rs"]
mod fake_model;

mod answers;
mod client;
mod doors;
mod ends;
mod garbage;
mod other_ways;
mod streams;
