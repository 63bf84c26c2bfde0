//! Serves a model that says back what it is told, so that clients of the server can be tested without a checkpoint:
//! `cargo run -p systems --features remote --example fake_server -- ADDRESS [KEY [MAX_QUEUED]]`.
//!
//! It says where it listens on standard error, and ends when its standard input does.

use std::{io::Read, net::SocketAddr, time::Duration};

use systems::serve::http::{HttpConfig, HttpServer};

#[path = "../tests/fake_model/mod.rs"]
mod fake_model;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address: SocketAddr = arguments.next().unwrap_or_else(|| "127.0.0.1:0".into()).parse()?;
    let api_key = arguments.next().filter(|key| !key.is_empty());
    let mut options = fake_model::Options { tick: Duration::from_millis(15), ..fake_model::Options::default() };
    if let Some(max_queued) = arguments.next() {
        options.settings.max_queued = max_queued.parse()?;
        options.max_running = 2;
    }
    let config =
        HttpConfig { model_name: "fake".into(), api_key, drain: Duration::from_secs(2), ..HttpConfig::default() };
    let server = HttpServer::start(address, config)?;
    eprintln!("listening at {}", server.url());
    let model = fake_model::FakeModel::start(fake_model::tokenizer(), options);
    server.serve(model.loaded(std::path::Path::new("")));
    eprintln!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop()?;
    Ok(())
}
