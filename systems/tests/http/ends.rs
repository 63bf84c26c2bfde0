//! Beginnings and ends: a server without a model yet, limits of time, and shutting down in good order.

use std::{io::Write, path::Path, thread, time::Duration};

use kernels::clock::now_nanos;
use serde_json::json;
use systems::serve::http::{HttpConfig, HttpServer};

use crate::{
    client::{Pieces, Site, ask, get, tokenizer, wait_for, with},
    fake_model::{FakeModel, Options},
};

fn secs_since(nanos: u64) -> f64 {
    (now_nanos() - nanos) as f64 * 1e-9
}

#[test]
fn a_server_is_there_before_its_model() {
    let server = HttpServer::start("127.0.0.1:0".parse().unwrap(), HttpConfig::default()).unwrap();
    let url = |path: &str| format!("{}{path}", server.url());
    let health = get(&url("/health"), None);
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("loading")));
    let reply = get(&url("/v1/models"), None);
    assert_eq!(reply.error(503)["code"], "model_loading");
    assert!(reply.header("retry-after").is_some());
    assert!(get(&url("/metrics"), None).text.contains("hadal:e2e_request_latency_seconds_count"));
    assert_eq!(get(&url("/"), None).status, 200);
    let model = FakeModel::start(tokenizer(), Options::default());
    server.serve(model.loaded(Path::new("")));
    let health = get(&url("/health"), None);
    assert_eq!((health.status, &health.json()["status"]), (200, &json!("ok")));
    assert_eq!(get(&url("/v1/models"), None).status, 200);
}

#[test]
fn an_answer_that_takes_too_long_is_ended() {
    let options = Options { tick: Duration::from_millis(50), ..Options::default() };
    let config = HttpConfig { request_timeout: Duration::from_millis(600), ..HttpConfig::default() };
    let site = Site::with(config, options);
    let long = ask(&"whale ".repeat(60));
    let error = site.post("/v1/chat/completions", &long).error(504);
    assert_eq!(error["code"], "timeout");
    let pieces = site.stream("/v1/chat/completions", &long);
    assert_eq!(pieces.last().unwrap()["error"]["code"], "timeout");
    assert!(pieces.len() > 1, "{pieces:?}");
    wait_for("their ends", || site.model.service.stats().num_running == 0);
    assert_eq!(site.model.service.stats().counters.num_finished["abort"], 2);
    // A body that does not come costs no more time than an answer.
    let mut stream = site.connect();
    stream.write_all(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{").unwrap();
    let begin = now_nanos();
    let mut reply = String::new();
    std::io::Read::read_to_string(&mut stream, &mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 504 ") && reply.contains("timeout"), "{reply}");
    assert!(secs_since(begin) < 5.0);
}

#[test]
fn running_answers_end_before_the_server_does() {
    let options = Options { tick: Duration::from_millis(30), ..Options::default() };
    let Site { server, model, .. } = Site::with(HttpConfig::default(), options);
    let site = Site { server, model, key: None };
    let mut pieces =
        Pieces::new(site.open("/v1/chat/completions", &with(ask("one two three four"), json!({ "stream": true }))));
    pieces.next().unwrap();
    let url = site.url("/health");
    let Site { server, model, .. } = site;
    let stopping = thread::Builder::new().name("stop".into()).spawn(move || server.stop()).unwrap();
    let rest: Vec<_> = pieces.by_ref().collect();
    assert!(pieces.is_done);
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "stop");
    stopping.join().unwrap().unwrap();
    assert!(model.service.is_closing());
    let refused = ureq::get(&url).call();
    assert!(matches!(refused, Err(ureq::Error::Io(_) | ureq::Error::ConnectionFailed)), "{refused:?}");
}

#[test]
fn what_does_not_end_in_time_is_cut() {
    let options = Options { tick: Duration::from_millis(50), ..Options::default() };
    let config = HttpConfig { drain: Duration::from_millis(400), ..HttpConfig::default() };
    let site = Site::with(config, options);
    let body = with(ask(&"whale ".repeat(60)), json!({ "stream": true }));
    let mut pieces = Pieces::new(site.open("/v1/chat/completions", &body));
    pieces.next().unwrap();
    let Site { server, model, .. } = site;
    let begin = now_nanos();
    server.stop().unwrap();
    assert!((0.4..3.0).contains(&secs_since(begin)), "{} s", secs_since(begin));
    let rest: Vec<_> = pieces.by_ref().collect();
    assert_eq!(rest.last().unwrap()["error"]["code"], "shutting_down");
    wait_for("the answer's end", || model.service.stats().num_running == 0);
}
