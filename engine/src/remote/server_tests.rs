//! Tests of the server against peers that do it right and peers that do not, on loopback.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use serde_json::{Value, json};

use super::*;
use crate::{
    control::{self, RpcError},
    remote::client::{Client, ClientEvent},
    telemetry::{Snapshot, tests::span},
};

/// A run that is none: answers requests by their name, and publishes what it is told to.
struct Fake {
    handle: ControlHandle,
    stop: Arc<AtomicBool>,
    num_published: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    server: Option<Server>,
    dir: tempfile::TempDir,
}

fn start(bind: &str) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let (handle, inbox) = control::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let num_published = Arc::new(AtomicU64::new(0));
    let published = num_published.clone();
    let body = move || {
        while !stopped.load(Ordering::Relaxed) {
            let Some(request) = inbox.recv_timeout(Duration::from_millis(5)) else { continue };
            request.reply.send(match request.method.as_str() {
                "run.status" => Ok(json!({ "name": "fake" })),
                // Changes with every second step.
                "world.get" => Ok(json!(published.load(Ordering::Relaxed) / 2)),
                method if request.may_change => Ok(json!(method)),
                _ => Err(RpcError::new(RpcError::NO_TOKEN, "no token")),
            });
        }
    };
    let thread = std::thread::Builder::new().name("fake run".into()).spawn(body).unwrap();
    let options = ServerOptions { bind: bind.parse().unwrap(), dir: dir.path().to_owned(), handle: handle.clone() };
    Fake { handle, stop, num_published, thread: Some(thread), server: Some(Server::start(options).unwrap()), dir }
}

impl Fake {
    fn address(&self) -> SocketAddr {
        self.server.as_ref().unwrap().address()
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("remote.token")).unwrap().trim().to_owned()
    }

    fn publish(&self, step: u64, num_spans: usize) {
        let spans = (0..num_spans).map(|i| span(&format!("task {i}"), 0, "compute", i as u64, i as u64 + 1)).collect();
        self.num_published.fetch_add(1, Ordering::Relaxed);
        self.handle.feed().publish(0, Arc::new(Snapshot { step, spans, ..Snapshot::default() }));
    }

    /// Sends a text and reads all that comes back, until the server closes.
    fn raw(&self, text: &[u8]) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.address().port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The server may stop listening before the end.
        let _ = stream.write_all(text);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn post(&self, headers: &str, body: &str) -> String {
        let len = body.len();
        self.raw(
            format!("POST /rpc HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}content-length: {len}\r\n\r\n{body}").as_bytes(),
        )
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        drop(self.server.take());
    }
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status: {answer:?}"))
}

fn client(fake: &Fake, token: Option<String>) -> Client {
    Client::connect(&format!("http://{}", fake.address()), token, Arc::new(|| {}))
}

/// The first event that is wanted; others are passed over.
fn wait<T>(client: &Client, mut want: impl FnMut(ClientEvent) -> Option<T>) -> T {
    for _ in 0..4000 {
        match client.try_event() {
            Some(event) => {
                if let Some(found) = want(event) {
                    return found;
                }
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    panic!("it does not come");
}

const STATUS: &str = r#"{"jsonrpc":"2.0","id":1,"method":"run.status"}"#;
const PAUSE: &str = r#"{"jsonrpc":"2.0","id":1,"method":"run.pause"}"#;

#[test]
fn http_answers_what_may_be_asked() {
    let fake = start("127.0.0.1:0");
    let good = format!("authorization: Bearer {}\r\n", fake.token());
    let long = "x".repeat(MAX_MESSAGE_BYTES_OVER);
    for (headers, body, code, says) in [
        ("", STATUS, 200, r#""name":"fake""#),
        ("", PAUSE, 401, "-32001"),
        (good.as_str(), PAUSE, 200, r#""result":"run.pause""#),
        ("authorization: Bearer abc\r\n", STATUS, 401, "remote.token"),
        ("authorization: Basic abc\r\n", STATUS, 401, "remote.token"),
        ("origin: https://evil.example\r\n", STATUS, 403, "evil.example"),
        ("", "{", 200, "-32700"),
        ("", "\u{1F600}", 200, "-32700"),
        ("", r#"{"jsonrpc":"2.0","method":"run.status"}"#, 204, ""),
        ("", &long, 413, "1048576 bytes at most"),
    ] {
        let answer = fake.post(headers, body);
        assert_eq!(status(&answer), code, "{headers} {}: {answer}", &body[..body.len().min(80)]);
        assert!(answer.contains(says), "{answer}");
    }
    assert_eq!(status(&fake.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")), 200);
    assert_eq!(status(&fake.raw(b"GET /rpc HTTP/1.1\r\nhost: localhost\r\n\r\n")), 400, "no upgrade");
    assert_eq!(status(&fake.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")), 404);
    assert_eq!(status(&fake.raw(b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n")), 403);
    assert_eq!(status(&fake.raw(b"\x16\x03\x01\x02\x00 no HTTP\r\n\r\n")), 400);
    let batch = fake.post("", &format!("[{STATUS},{PAUSE}]"));
    assert!(batch.contains("fake") && batch.contains("-32001"), "{batch}");
    fake.end();
}

const MAX_MESSAGE_BYTES_OVER: usize = protocol::MAX_MESSAGE_BYTES + 1;

#[test]
fn beyond_loopback_everything_needs_the_token() {
    let fake = start("0.0.0.0:0");
    assert_eq!(status(&fake.post("", STATUS)), 401);
    assert_eq!(status(&fake.raw(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")), 401);
    let good = format!("authorization: Bearer {}\r\n", fake.token());
    assert_eq!(status(&fake.post(&good, STATUS)), 200);
    fake.end();
}

#[test]
fn a_client_follows_asks_and_finds_the_run_again() {
    let fake = start("127.0.0.1:0");
    let with_token = client(&fake, Some(fake.token()));
    let looking = client(&fake, None);
    for client in [&with_token, &looking] {
        let name = wait(client, |event| match event {
            ClientEvent::Connected { name } => Some(name),
            _ => None,
        });
        assert_eq!(name, "fake");
    }
    while fake.handle.feed().listeners().0 < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    fake.publish(7, 3);
    for client in [&with_token, &looking] {
        let snapshot = wait(client, |event| match event {
            ClientEvent::Snapshot(snapshot) => Some(snapshot),
            _ => None,
        });
        assert_eq!((snapshot.step, snapshot.spans.len()), (7, 3));
    }
    for (client, want) in [(&with_token, Ok(json!("run.pause"))), (&looking, Err(RpcError::NO_TOKEN))] {
        let asked = client.call("run.pause", Value::Null);
        let result = wait(client, |event| match event {
            ClientEvent::Reply { id, result } => (id == asked).then_some(result),
            _ => None,
        });
        assert_eq!(result.map_err(|error| error.code), want);
    }
    // The run ends, and another begins where it was.
    let address = fake.address().to_string();
    fake.end();
    let lost = |event| match event {
        ClientEvent::Lost { why } => Some(why),
        _ => None,
    };
    assert_eq!(wait(&looking, lost), "the run is over");
    let asked = looking.call("run.status", Value::Null);
    let refused = wait(&looking, |event| match event {
        ClientEvent::Reply { id, result } if id == asked => Some(result.unwrap_err().code),
        _ => None,
    });
    assert_eq!(refused, RpcError::OVER);
    let fake = start(&address);
    wait(&looking, |event| matches!(event, ClientEvent::Connected { .. }).then_some(()));
    let why = wait(&with_token, |event| match event {
        ClientEvent::Lost { why } if why.contains("remote.token") => Some(why),
        _ => None,
    });
    assert!(why.contains("cannot enter"), "another run has another token: {why}");
    fake.end();
}

#[test]
fn what_is_watched_is_told_when_it_has_changed() {
    let fake = start("127.0.0.1:0");
    let client = client(&fake, Some(fake.token()));
    wait(&client, |event| matches!(event, ClientEvent::Connected { .. }).then_some(()));
    let watched = client.call("world.get+watch", json!({}));
    let answer = |asked| {
        wait(&client, |event| match event {
            ClientEvent::Reply { id, result } if id == asked => Some(result),
            _ => None,
        })
    };
    assert_eq!(answer(watched), Ok(json!(0)));
    (1..=2).for_each(|step| fake.publish(step, 1));
    assert_eq!(answer(watched), Ok(json!(1)), "and not after the first step, which changed nothing");
    assert_eq!(
        answer(client.call("rpc.unwatch", json!({ "id": watched + 1 }))).unwrap_err().code,
        RpcError::INVALID_PARAMS
    );
    assert_eq!(answer(client.call("rpc.unwatch", json!({ "id": watched }))), Ok(Value::Null));
    (3..=4).for_each(|step| fake.publish(step, 1));
    let changes = client.call("run.pause+watch", Value::Null);
    assert_eq!(answer(changes).unwrap_err().code, RpcError::NO_TOKEN, "a watch only looks, whoever asks");
    assert!(
        std::iter::from_fn(|| client.try_event())
            .all(|event| !matches!(event, ClientEvent::Reply { id, .. } if id == watched))
    );
    fake.end();
}

#[test]
fn a_peer_that_never_reads_misses_the_oldest_and_is_let_go() {
    let fake = start("127.0.0.1:0");
    let mut stalled = TcpStream::connect(fake.address()).unwrap();
    let upgrade = "GET /telemetry HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stalled.write_all(upgrade.as_bytes()).unwrap();
    while fake.handle.feed().listeners().0 < 1 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let reading = client(&fake, None);
    wait(&reading, |event| matches!(event, ClientEvent::Connected { .. }).then_some(()));
    // Some hundred kilobytes each, while one reads and the other does not.
    let mut last = 0;
    for step in 1..=100 {
        fake.publish(step, 10_000);
        let seen = wait(&reading, |event| match event {
            ClientEvent::Snapshot(snapshot) => Some(snapshot.step),
            _ => None,
        });
        assert!(seen > last);
        last = seen;
    }
    let (_, num_dropped) = fake.handle.feed().listeners();
    assert!(num_dropped > 20, "the one that does not read missed {num_dropped} of 100");
    for _ in 0..3000 {
        if fake.handle.feed().listeners().0 == 1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(fake.handle.feed().listeners().0, 1, "it was let go");
    fake.end();
}

#[test]
fn idle_connections_are_few_and_short_lived() {
    let fake = start("127.0.0.1:0");
    let idle: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(fake.address()).unwrap()).collect();
    let told = |mut stream: &TcpStream, patience| {
        stream.set_read_timeout(Some(patience)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    // Those beyond the limit are told so, or closed.
    let text = told(&idle[199], Duration::from_secs(5)).unwrap_or_default();
    assert!(text.is_empty() || status(&text) == 503, "{text}");
    let text = told(&idle[70], Duration::from_secs(5)).unwrap_or_default();
    assert!(text.is_empty() || status(&text) == 503, "{text}");
    // The others make room after their time.
    let text = told(&idle[0], Duration::from_secs(20)).unwrap_or_default();
    assert!(text.is_empty() || status(&text) == 408, "{text}");
    idle.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(status(&fake.post("", STATUS)), 200);
    fake.end();
}
