//! Who may come in: the key, other names of this machine, pages from elsewhere; and how many.

use std::{io::Read, time::Duration};

use serde_json::json;
use systems::serve::http::{HttpConfig, HttpServer};

use crate::{
    client::{Site, agent, ask, get, whole, with},
    fake_model::Options,
};

const GETS: [&str; 6] = ["/", "/metrics", "/v1/models", "/v1/models/hadal", "/v1/routing", "/nowhere"];
const POSTS: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"];

#[test]
fn nothing_but_health_answers_without_the_key() {
    let config = HttpConfig { api_key: Some("secret".into()), ..HttpConfig::default() };
    let site = Site::with(config, Options::default());
    assert_eq!(get(&site.url("/health"), None).status, 200);
    for path in GETS.into_iter().chain(POSTS) {
        for key in [None, Some("secre"), Some("secret2")] {
            let reply = get(&site.url(path), key);
            assert_eq!(reply.error(401)["code"], "invalid_api_key", "{path}");
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        }
    }
    for path in POSTS {
        let request = agent().post(site.url(path)).header("Content-Type", "application/json");
        whole(request.send(ask("hi").to_string()).unwrap()).error(401);
    }
    assert_eq!(site.model.service.stats().counters.num_steps, 0, "the model was asked");
    site.assert_lives();
    for path in &GETS[..5] {
        assert_eq!(site.get(path).status, 200, "{path}");
    }
    // A person gets a page that asks for the key, under the same status, and nothing of what is behind it.
    let reply = whole(agent().get(site.url("/")).header("Accept", "text/html,*/*").call().unwrap());
    assert_eq!((reply.status, reply.header("content-type")), (401, Some("text/html; charset=utf-8")));
    assert!(reply.text.contains("password") && !reply.text.contains("/v1/routing"));
}

#[test]
fn a_server_of_this_machine_is_reached_by_its_name_only() {
    let site = Site::new();
    let by_name = |host: &str| whole(agent().get(site.url("/v1/models")).header("Host", host).call().unwrap());
    assert_eq!(by_name("evil.example").error(403)["code"], "wrong_host");
    assert_eq!(by_name("localhost:80").status, 200);
    let config = HttpConfig { api_key: Some("k".into()), ..HttpConfig::default() };
    let site = Site::with(config, Options::default());
    let request =
        agent().get(site.url("/v1/models")).header("Host", "proxy.example").header("Authorization", "Bearer k");
    assert_eq!(whole(request.call().unwrap()).status, 200);
}

#[test]
fn pages_from_elsewhere_are_let_in_by_name() {
    let preflight = |site: &Site, origin: &str| {
        let request = ureq::http::Request::options(site.url("/v1/chat/completions"))
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "authorization,content-type")
            .body(())
            .unwrap();
        let reply = whole(agent().run(request).unwrap());
        reply.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(preflight(&Site::new(), "https://a.example"), None);
    let config = HttpConfig {
        cors_origins: vec!["https://a.example".into()],
        api_key: Some("k".into()),
        ..HttpConfig::default()
    };
    let site = Site::with(config, Options::default());
    assert_eq!(preflight(&site, "https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(preflight(&site, "https://b.example"), None);
    let wrong = HttpConfig { cors_origins: vec!["a.example".into()], ..HttpConfig::default() };
    let error = HttpServer::start("127.0.0.1:0".parse().unwrap(), wrong).err().unwrap().to_string();
    assert!(error.contains("expected an origin such as"), "{error}");
}

#[test]
fn a_full_queue_is_told_when_to_come_again() {
    let mut options = Options { tick: Duration::from_millis(100), max_running: 1, ..Options::default() };
    options.settings.max_queued = 2;
    let site = Site::with(HttpConfig::default(), options);
    let body = with(ask("one two three four five"), json!({ "stream": true }));
    let mut refused = 0;
    let mut open = Vec::new();
    for _ in 0..6 {
        let response = site.open("/v1/chat/completions", &body);
        if response.status() == 200 {
            open.push(response);
        } else {
            let reply = whole(response);
            let error = reply.error(429);
            assert_eq!((&error["code"], &error["type"]), (&json!("queue_full"), &json!("rate_limit_error")));
            assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
            refused += 1;
        }
    }
    assert!(refused >= 2 && open.len() >= 2, "{refused} refused of 6");
    // A request that does not fit as a whole leaves none of its answers behind.
    let many = with(ask("one two"), json!({ "n": 3 }));
    site.post("/v1/chat/completions", &many).error(429);
}

#[test]
fn more_connections_than_places_are_told_so() {
    let config = HttpConfig { max_connections: 2, ..HttpConfig::default() };
    let site = Site::with(config, Options::default());
    let held = [site.connect(), site.connect()];
    let mut reply = String::new();
    site.connect().read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503 ") && reply.contains("too_many_connections"), "{reply}");
    drop(held);
    crate::client::wait_for("a free place", || site.server_answers());
}

impl Site {
    fn server_answers(&self) -> bool {
        self.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 200")
    }
}
