//! Serving: requests as entities, that share the model's steps. Each step admits as many tokens as its budget has, of prompts and of
//! texts that grow alike: a request only ever catches up with the tokens it has.
//!
//! [`requests`] are the entities, [`schedule`] what a step computes of which, over the blocks of a [`pool`]; [`step`] runs it.
//! [`service`] is the way in for whoever asks, from any thread; what is asked and what comes back is in [`request`]. [`watch`] is what
//! others see of it.

pub mod batch;
pub mod cache;
pub mod grammar;
pub mod host;
#[cfg(feature = "remote")]
pub mod http;
pub mod load;
pub mod pool;
pub mod request;
pub mod requests;
pub mod sample;
pub mod schedule;
pub mod service;
pub mod step;
pub mod text;
pub mod watch;

pub use cache::CacheFormat;
pub use host::{Host, HostOptions, HostRequest};
pub use kernels::ops::mla::latent::Prefill;
pub use request::{Event, Finish, FinishReason, Logprob, Params, Sink, Submission, Task, Token};
pub use service::{Counters, Inbox, LayerLoad, Message, Refused, Service, Settings, Stats, Ticket};
pub use step::{Capacity, ServePlugin, Server};
pub use watch::WatchPlugin;
