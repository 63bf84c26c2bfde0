//! Processes as somebody who listens to the first sees them: the tasks of all, at one clock, to the last step.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    iter,
    net::TcpStream,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use engine::{
    remote::client::{Client, ClientEvent},
    telemetry::Snapshot,
};
use serde_json::Value;

use super::{args, libraries, mpiexec};

const NUM_RANKS: usize = 4;

/// The next of these events.
fn wait<T>(client: &Client, mut want: impl FnMut(ClientEvent) -> Option<T>) -> T {
    for _ in 0..12_000 {
        match client.try_event() {
            None => thread::sleep(Duration::from_millis(5)),
            Some(event) => {
                if let Some(found) = want(event) {
                    return found;
                }
            }
        }
    }
    panic!("it does not come");
}

/// One with tasks.
fn traced(event: ClientEvent) -> Option<Arc<Snapshot>> {
    match event {
        ClientEvent::Snapshot(snapshot) => Some(snapshot).filter(|snapshot| !snapshot.spans.is_empty()),
        _ => None,
    }
}

fn check(snapshot: &Snapshot) {
    let ranks: BTreeSet<u32> = snapshot.spans.iter().map(|span| span.rank).collect();
    assert_eq!(ranks, (0..NUM_RANKS as u32).collect(), "step {}", snapshot.step);
    let (begin, end) = snapshot.interval_nanos;
    for rank in ranks {
        let spans = || snapshot.spans.iter().filter(|span| span.rank == rank);
        assert!(spans().any(|span| span.kind.0 == "attention_forward"), "rank {rank}");
        let (first, last) = (spans().map(|span| span.start_nanos).min(), spans().map(|span| span.end_nanos).max());
        assert!(first >= Some(begin) && last <= Some(end), "rank {rank} is within the step");
        for span in spans() {
            let waited_for = span.waited_for.map(|task| snapshot.spans[task as usize].rank);
            assert!(waited_for.is_none_or(|of| of == rank), "streams of a rank wait for each other: {span:?}");
        }
    }
    // A mesh's ranks meet in each microbatch: none is done with the step before another has begun.
    let of = |rank: u32| snapshot.spans.iter().filter(move |span| span.rank == rank);
    for (a, b) in [(0, 1), (0, 2), (1, 3), (2, 1)] {
        let (begun, ended) = (of(a).map(|span| span.start_nanos).min(), of(b).map(|span| span.end_nanos).max());
        assert!(begun < ended, "ranks {a} and {b} are at one clock");
    }
}

fn ask(client: &Client, method: &str) -> Value {
    ask_between(client, method, drop)
}

/// The answer, and what else comes before it.
fn ask_between(client: &Client, method: &str, mut other: impl FnMut(ClientEvent)) -> Value {
    let asked = client.call(method, Value::Null);
    wait(client, |event| match event {
        ClientEvent::Reply { id, result } if id == asked => Some(result.expect("an answer")),
        event => {
            other(event);
            None
        }
    })
}

fn metrics(url: &str) -> String {
    let address = url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("it listens");
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")
        .expect("it takes a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn start(prefix: &Path, dir: &Path) -> (std::process::Child, PathBuf) {
    let sets = ["mesh.pp=2", "mesh.ep=2", "train.steps=1000000", "eval=None", "checkpoint=None", "sample=None"];
    let sets = [&sets[..], &["remote=(bind: \"127.0.0.1:0\")", "telemetry.trace_steps=None"]].concat();
    let args: Vec<String> = args(dir, &sets).into_iter().filter(|arg| !arg.contains("y_steps=")).collect();
    (mpiexec(prefix, NUM_RANKS, &args).spawn().expect("mpiexec starts"), dir.join("tiny"))
}

#[test]
fn who_listens_to_the_first_sees_all() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let (mut launcher, run) = start(&prefix, dir.path());
    let is_there = || run.join("remote.json").exists() && run.join("remote.token").exists();
    (0..1200).take_while(|_| !is_there()).for_each(|_| thread::sleep(Duration::from_millis(50)));
    let document = fs::read_to_string(run.join("remote.json")).expect("it listens");
    let document: Value = serde_json::from_str(&document).expect("JSON");
    let url = document["url"].as_str().expect("a url");
    let token = fs::read_to_string(run.join("remote.token")).expect("a token").trim().to_owned();
    let client = Client::connect(url, Some(token), Arc::new(|| {}));
    for _ in 0..3 {
        check(&wait(&client, traced));
    }
    let figures = wait(&client, |event| match event {
        ClientEvent::Snapshot(snapshot) => Some(snapshot),
        _ => None,
    });
    assert!(figures.scalar("loss_nats_per_token").is_some(), "figures of every step");
    let text = metrics(url);
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("hadal_num_ranks{run=\"tiny\"} 4.0"), "{text}");
    assert!(text.contains("hadal_loss_nats_per_token{run=\"tiny\"} "), "{text}");
    // Paused, the step that was done last comes as a whole, unless the one before was a moment ago.
    ask(&client, "run.pause");
    let last = (0..40).find_map(|_| {
        let mut events = vec![];
        let step = ask_between(&client, "run.step", |event| events.push(event))["step"].as_u64();
        thread::sleep(Duration::from_millis(250));
        events.extend(iter::from_fn(|| client.try_event()));
        events.into_iter().filter_map(traced).find(|snapshot| Some(snapshot.step) == step)
    });
    check(&last.expect("a step of a paused run"));
    client.call("run.stop", Value::Null);
    assert!(launcher.wait().expect("mpiexec ends").success());
}
