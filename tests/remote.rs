//! A headless run watched and steered from another process, through the binary: a client that subscribes, pauses, steps once,
//! changes the learning rate, saves and stops; and peers that do all wrong that they can, which leave the run unharmed.
//!
//! Only loopback addresses are used.
#![cfg(feature = "remote")]

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use engine::{
    control::{RpcError, RpcResult},
    remote::client::{Client, ClientEvent},
    telemetry::Snapshot,
};
use serde_json::{Value, json};

/// A run of `scenes/tiny.ron` in a folder of its own, killed if the test fails.
struct Run {
    child: Child,
    dir: PathBuf,
    _parent: tempfile::TempDir,
}

impl Drop for Run {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it with a server, and waits until that listens.
fn start(sets: &[&str]) -> Run {
    let parent = tempfile::tempdir().expect("a folder");
    let mut args = vec!["run".to_owned(), "scenes/tiny.ron".into()];
    let dir = format!("telemetry.dir={:?}", parent.path().to_str().expect("UTF-8"));
    let common = ["train.steps=1000000", "remote=(bind: \"127.0.0.1:0\")", "eval=(every_steps: 1000000)", &dir];
    args.extend(common.iter().chain(sets).map(|set| format!("--set={set}")));
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().expect("the program starts");
    let mut run = Run { child, dir: parent.path().join("tiny"), _parent: parent };
    for _ in 0..6000 {
        if run.dir.join("remote.json").exists() {
            return run;
        }
        if run.child.try_wait().expect("a status").is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = run.child.kill();
    let mut stderr = String::new();
    run.child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    panic!("it does not listen:\n{stderr}");
}

impl Run {
    fn url(&self) -> String {
        let text = fs::read_to_string(self.dir.join("remote.json")).expect("the address");
        let document: Value = serde_json::from_str(&text).expect("JSON");
        document["url"].as_str().expect("a url").to_owned()
    }

    fn port(&self) -> u16 {
        self.url().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    fn token(&self) -> String {
        fs::read_to_string(self.dir.join("remote.token")).expect("the token").trim().to_owned()
    }

    /// Lines of training steps in the log.
    fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.join("log.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter(|line| line.get("lr").is_some()).collect()
    }

    /// Its exit code, when it ends by itself.
    fn ended(&mut self) -> Option<i32> {
        for _ in 0..6000 {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }

    /// Sends a text, and what comes back until the server closes; empty if it closes without a word.
    fn raw(&self, text: &[u8]) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port())).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
        // It may refuse before all is sent.
        let _ = stream.write_all(text);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn post(&self, token: Option<&str>, body: &[u8]) -> String {
        let token = token.map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
        let head = format!("POST /rpc HTTP/1.1\r\nhost: 127.0.0.1\r\n{token}content-length: {}\r\n\r\n", body.len());
        self.raw(&[head.as_bytes(), body].concat())
    }

    /// Optimizer steps done, as the run says.
    fn step(&self) -> u64 {
        let answer = self.post(None, br#"{"jsonrpc":"2.0","id":1,"method":"run.status"}"#);
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_else(|| panic!("no body: {answer:?}"));
        let status: Value = serde_json::from_str(body).expect("JSON");
        status["result"]["step"].as_u64().unwrap_or_else(|| panic!("no step: {status}"))
    }
}

/// A client with what came and was not asked for yet.
struct Watcher {
    client: Client,
    snapshots: Vec<Arc<Snapshot>>,
}

impl Watcher {
    fn connect(run: &Run, token: Option<String>) -> Self {
        Watcher { client: Client::connect(&run.url(), token, Arc::new(|| {})), snapshots: Vec::new() }
    }

    fn wait<T>(&mut self, mut want: impl FnMut(&ClientEvent) -> Option<T>) -> T {
        for _ in 0..12_000 {
            let Some(event) = self.client.try_event() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            let found = want(&event);
            if let ClientEvent::Snapshot(snapshot) = event {
                self.snapshots.push(snapshot);
            }
            if let Some(found) = found {
                return found;
            }
        }
        panic!("it does not come");
    }

    fn connected(&mut self) -> String {
        self.wait(|event| match event {
            ClientEvent::Connected { name } => Some(name.clone()),
            _ => None,
        })
    }

    fn ask(&mut self, method: &str, params: Value) -> RpcResult {
        let asked = self.client.call(method, params);
        self.wait(|event| match event {
            ClientEvent::Reply { id, result } if *id == asked => Some(result.clone()),
            _ => None,
        })
    }

    fn next_snapshot(&mut self) -> Arc<Snapshot> {
        self.wait(|event| match event {
            ClientEvent::Snapshot(snapshot) => Some(snapshot.clone()),
            _ => None,
        })
    }
}

#[test]
fn a_run_is_watched_paused_stepped_changed_saved_and_stopped() {
    for ranks in [1, 2] {
        let mesh = format!("mesh=(ep: {ranks})");
        let mut run = start(&[&mesh, "schedule=Constant(lr: 1e-3)", "routing.bias_warm_down_steps=0"]);
        let mut watcher = Watcher::connect(&run, Some(run.token()));
        assert_eq!(watcher.connected(), "tiny");
        let seen = watcher.next_snapshot();
        let num_ranks = seen.spans.iter().map(|span| span.rank).max().map_or(0, |last| last + 1);
        assert_eq!(num_ranks, ranks, "a snapshot has the spans of all ranks");
        assert!(seen.spans.iter().any(|span| span.kind.0 == "attention_forward"), "tasks by their kinds");
        assert!(seen.scalar("loss_nats_per_token").is_some());
        for class in ["weights", "gradients", "optimizer", "activations"] {
            let name = if ranks == 1 { format!("bytes/{class}") } else { format!("bytes/rank1/{class}") };
            assert!(seen.scalar(&name).is_some_and(|bytes| bytes > 0.0), "{name}: {:?}", seen.scalars);
        }
        assert_eq!(ranks > 1, seen.scalar("link_bytes/rank0/intra_node").is_some_and(|bytes| bytes > 0.0));
        let of_length =
            |name: &str| seen.histograms.iter().find(|(key, _)| key == name).map(|(_, values)| values.len());
        assert_eq!((of_length("load/layer 1"), of_length("bias/layer 1")), (Some(8), Some(8)));
        let num_tasks = seen.spans.iter().filter(|span| span.rank == 0).count();
        assert_eq!(of_length("live_bytes/task"), Some(num_tasks));

        // Paused, it stands; a step is one step.
        let paused = watcher.ask("run.pause", Value::Null).expect("it pauses");
        assert_eq!((&paused["state"], &paused["num_ranks"]), (&json!("paused"), &json!(ranks)));
        let at = paused["step"].as_u64().expect("a step");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(run.step(), at);
        let stepped = watcher.ask("run.step", Value::Null).expect("it steps");
        assert_eq!((stepped["step"].as_u64(), &stepped["state"]), (Some(at + 1), &json!("paused")));

        // The learning rate is in force in the next step, and the log says so.
        let set = watcher.ask("run.set", json!({ "path": "lr", "value": 2.5e-4 })).expect("it is set");
        assert_eq!((&set["value"], &set["set"]), (&json!(2.5e-4), &json!(2.5e-4)));
        watcher.ask("run.set", json!({ "path": "bias_speed", "value": 0.5 })).expect("it is set");
        let wrong = watcher.ask("run.set", json!({ "path": "lr", "value": -1 })).expect_err("no negative rate");
        assert_eq!(wrong.code, RpcError::INVALID_PARAMS);
        watcher.ask("run.step", Value::Null).expect("it steps");
        let log = run.log();
        let rates: Vec<_> = log[log.len() - 2..].iter().map(|line| (&line["lr"], &line["bias_speed"])).collect();
        assert_eq!(rates, [(&json!(1e-3), &json!(0.03)), (&json!(2.5e-4), &json!(0.5))]);
        assert_eq!(log.last().map(|line| &line["step"]), Some(&json!(at + 2)));

        // What there is can be looked at.
        let layers = watcher.ask("world.query", json!({ "components": ["Expert", "Load"] })).expect("entities");
        let experts = layers["entities"].as_array().expect("a list");
        let tokens: u64 = experts.iter().filter_map(|e| e["components"]["Load"]["num_tokens"].as_u64()).sum();
        assert!(!experts.is_empty() && tokens > 0, "{layers}");
        let graph = watcher.ask("graph.get", Value::Null).expect("tasks");
        assert_eq!(graph["tasks"].as_array().map(Vec::len), Some(num_tasks));

        // Saved while paused; and once more, since the same step is saved already.
        for _ in 0..2 {
            let saved = watcher.ask("run.checkpoint", Value::Null).expect("it is saved");
            let path = Path::new(saved["path"].as_str().expect("a path"));
            let weights = ["model.safetensors", "model.safetensors.index.json"].map(|name| path.join(name).is_file());
            assert!(weights.contains(&true) && path.join("train/state.json").is_file(), "{saved}");
            assert_eq!(saved["step"], at + 2);
        }
        // While it runs, too.
        watcher.ask("run.resume", Value::Null).expect("it goes on");
        watcher.next_snapshot();
        let saved = watcher.ask("run.checkpoint", Value::Null).expect("it is saved");
        assert!(saved["step"].as_u64().is_some_and(|step| step > at + 2), "{saved}");

        watcher.ask("run.stop", Value::Null).expect("it stops");
        assert_eq!(run.ended(), Some(0), "stopped on request is no failure");
        let last = run.log().last().and_then(|line| line["step"].as_u64()).expect("a step");
        assert!(
            run.dir.join(format!("checkpoints/step-{last:07}/manifest.json")).is_file()
                || run.dir.join(format!("checkpoints/step-{last:07}")).is_dir()
        );
        assert!(
            !run.dir.join("remote.json").exists() && !run.dir.join("remote.token").exists(),
            "nobody listens any more"
        );
        watcher.wait(|event| matches!(event, ClientEvent::Lost { .. }).then_some(()));
    }
}

/// Batches of validation come between training steps: they are no steps to who watches, and their result belongs to one.
#[test]
fn steps_are_those_of_training() {
    let mut run = start(&["eval=(every_steps: 2, max_tokens: 2048)"]);
    let mut watcher = Watcher::connect(&run, Some(run.token()));
    watcher.connected();
    let at = watcher.ask("run.pause", Value::Null).expect("it pauses")["step"].as_u64().expect("a step");
    let asked: Vec<_> = (0..4).map(|_| watcher.client.call("run.step", Value::Null)).collect();
    for (i, asked) in asked.into_iter().enumerate() {
        let status = watcher.wait(|event| match event {
            ClientEvent::Reply { id, result } if *id == asked => Some(result.clone()),
            _ => None,
        });
        assert_eq!(status.expect("it steps")["step"], at + 1 + i as u64, "each is answered when it is done");
    }
    // Validation after the last of them may be still to come: it is done with the next.
    watcher.ask("run.step", Value::Null).expect("it steps");
    watcher.ask("run.stop", Value::Null).expect("it stops");
    assert_eq!(run.ended(), Some(0));
    watcher.wait(|event| matches!(event, ClientEvent::Lost { .. }).then_some(()));
    let (steps, figures): (Vec<_>, Vec<_>) = watcher.snapshots.iter().partition(|snapshot| !snapshot.spans.is_empty());
    assert!(steps.windows(2).all(|pair| pair[1].step == pair[0].step + 1), "one step after the other");
    assert!(steps.iter().all(|snapshot| snapshot.scalar("loss_nats_per_token").is_some()), "all of them train");
    assert_eq!(steps.last().map(|snapshot| snapshot.step), Some(at + 5));
    assert!(figures.len() >= 2, "{} of them", figures.len());
    for snapshot in figures {
        assert_eq!(snapshot.step % 2, 0);
        let names: Vec<_> = snapshot.scalars.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["val_loss_nats_per_token", "val_bits_per_byte"]);
    }
}

#[test]
fn what_was_set_is_in_force_after_a_resume_too() {
    let mut run = start(&["schedule=Constant(lr: 1e-3)"]);
    let token = run.token();
    let post = |run: &Run, method: &str, params: Value| {
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string();
        assert!(run.post(Some(&token), body.as_bytes()).starts_with("HTTP/1.1 200"));
    };
    post(&run, "run.set", json!({ "path": "lr", "value": 7e-4 }));
    let at = run.step();
    while run.step() < at + 2 {}
    post(&run, "run.stop", Value::Null);
    assert_eq!(run.ended(), Some(0));
    let state = fs::read_to_string(run.dir.join("latest/train/state.json")).expect("a state");
    let state: Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!(state["live"], json!({ "lr": 7e-4 }));
    let steps = state["step"].as_u64().expect("a step");
    let parent = run.dir.parent().and_then(Path::to_str).expect("UTF-8");
    let resumed = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(["run", "scenes/tiny.ron", "--resume", "--set=schedule=Constant(lr: 1e-3)"])
        .arg("--set=telemetry.trace_steps=None")
        .args([format!("--set=train.steps={}", steps + 2), format!("--set=telemetry.dir={parent:?}")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("the program starts");
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let log = run.log();
    assert_eq!(log.last().map(|line| (&line["step"], &line["lr"])), Some((&json!(steps + 2), &json!(7e-4))));
}

#[test]
fn the_wrong_token_is_refused_and_no_token_may_look() {
    let run = start(&[]);
    let pause = br#"{"jsonrpc":"2.0","id":1,"method":"run.pause"}"#;
    for token in [None, Some("0000"), Some("")] {
        let answer = run.post(token, pause);
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("-32001"), "{token:?}: {answer}");
    }
    let batch = [&b"["[..], pause, b",", pause, b"]"].concat();
    assert!(run.post(None, &batch).starts_with("HTTP/1.1 401"), "of a batch, too");
    let mut looking = Watcher::connect(&run, None);
    assert_eq!(looking.connected(), "tiny");
    looking.next_snapshot();
    assert_eq!(looking.ask("run.stop", Value::Null).map_err(|error| error.code), Err(RpcError::NO_TOKEN));
    let mut wrong = Watcher::connect(&run, Some("0000".into()));
    let why = wrong.wait(|event| match event {
        ClientEvent::Lost { why } => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("remote.token"), "{why}");
    let at = run.step();
    while run.step() < at + 3 {}
}

#[test]
fn a_run_goes_on_whatever_its_peers_do() {
    let run = start(&[]);
    let goes_on = |after: &str| {
        let at = run.log().len();
        for _ in 0..3000 {
            if run.log().len() > at + 2 {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the run stands after {after}");
    };
    // Malformed, in several ways.
    let deep = "[".repeat(500_000);
    for text in ["{", "nonsense", "", "\u{0}\u{0}", "[1,2", r#"{"jsonrpc":"2.0","id":1,"method":"#, &deep] {
        let answer = run.post(None, text.as_bytes());
        assert!(answer.contains("-32700"), "{}: {answer}", &text[..text.len().min(40)]);
    }
    goes_on("malformed JSON");
    // Ten megabytes, announced and not, and over a WebSocket.
    let large = vec![b' '; 10_000_000];
    let answer = run.post(None, &large);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    let endless = b"POST /rpc HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n989680\r\n";
    let answer = run.raw(&[&endless[..], &large].concat());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    let endless = format!("GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: {}\r\n\r\n", "y".repeat(10_000_000));
    let answer = run.raw(endless.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    let upgrade = "GET /rpc HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    // A frame of text of 10 MB, by its head.
    let frame = [0x81, 0xff, 0, 0, 0, 0, 0, 0x98, 0x96, 0x80, 0, 0, 0, 0];
    let answer = run.raw(&[upgrade.as_bytes(), &frame, &large].concat());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 101"), "{answer}");
    goes_on("10 MB");
    // One that never reads, among others.
    let mut stalled = TcpStream::connect(("127.0.0.1", run.port())).expect("it listens");
    stalled.write_all(upgrade.replace("/rpc", "/telemetry").as_bytes()).expect("sent");
    goes_on("a client that never reads");
    // A thousand that say nothing: as many as this process may open.
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let wanted = allowed.maximum.map_or(4096, |most| most.min(4096));
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(wanted), ..allowed },
    );
    let num_idle = wanted.saturating_sub(100).min(1000);
    let idle: Vec<TcpStream> =
        (0..num_idle).map(|_| TcpStream::connect(("127.0.0.1", run.port())).expect("it listens")).collect();
    goes_on("many idle connections");
    // Those beyond the limit were told so, or closed.
    let mut told = String::new();
    idle[idle.len() - 1].set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
    let _ = (&idle[idle.len() - 1]).read_to_string(&mut told);
    assert!(told.is_empty() || told.starts_with("HTTP/1.1 503"), "{told}");
    // The others are let go, so that there is room although they stay.
    let mut answers = (0..200).map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        run.raw(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    });
    assert!(answers.any(|answer| answer.starts_with("HTTP/1.1 200")), "there is room again");
    drop((idle, stalled));
    goes_on("all that");
}

/// What a client that subscribes and never reads costs a step, in pairs of windows with and without one, in turns in one run:
/// `cargo test --release --test remote -- --ignored --nocapture`.
#[test]
#[ignore = "prints a share of a step that needs minutes on a quiet machine; what may not happen is tested above"]
fn the_cost_of_a_client_that_never_reads() {
    const NUM_PAIRS: usize = 100;
    const STEPS: usize = 50;
    let run = start(&["telemetry.log_every_steps=1000000", "checkpoint=(every_steps: 1000000)"]);
    let median = |mut values: Vec<f64>| {
        values.sort_unstable_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let step_secs =
        |line: &Value| line["step_secs"].as_f64().expect("a time") + line["between_secs"].as_f64().expect("a time");
    // What the log grew by: to read all of it again and again would take the run's second core.
    while run.log().is_empty() {
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut log = fs::File::open(run.dir.join("log.jsonl")).expect("a log");
    let mut window = || {
        log.seek(SeekFrom::End(0)).expect("an end");
        let mut text = String::new();
        // The line at hand may be half written, and its step began before.
        while text.lines().count() < STEPS + 3 {
            std::thread::sleep(Duration::from_millis(100));
            log.read_to_string(&mut text).expect("UTF-8");
        }
        let lines = text.lines().skip(2).take(STEPS).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.map(|line| step_secs(&line)).collect::<Vec<f64>>()
    };
    let stalled = || {
        let mut stream = TcpStream::connect(("127.0.0.1", run.port())).expect("it listens");
        let upgrade = "GET /telemetry HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                       sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(upgrade.as_bytes()).expect("sent");
        stream
    };
    // Nanoseconds that the server's thread has run.
    let server_nanos = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", run.child.id())).expect("threads").flatten();
        let is_server = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "remote")
        };
        let server = tasks.into_iter().find(is_server).expect("the server's thread");
        let text = fs::read_to_string(server.path().join("schedstat")).expect("its times");
        text.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()).expect("a number")
    };
    window();
    let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut stalled_nanos = 0;
    for pair in 0..NUM_PAIRS {
        let mut one = |stall: bool| {
            let peer = stall.then(stalled);
            let before = server_nanos();
            let times = window();
            stalled_nanos += if stall { server_nanos() - before } else { 0 };
            drop(peer);
            if stall {
                with.extend(times.iter().copied())
            } else {
                without.extend(times.iter().copied())
            }
            median(times)
        };
        // Which comes first changes from pair to pair.
        let first = one(pair % 2 == 0);
        let second = one(pair % 2 == 1);
        ratios.push(if pair % 2 == 0 { first / second } else { second / first });
    }
    let server_secs = stalled_nanos as f64 * 1e-9 / with.len() as f64;
    let (without, with) = (median(without), median(with));
    ratios.sort_unstable_by(f64::total_cmp);
    let quartiles = [ratios[NUM_PAIRS / 4], ratios[NUM_PAIRS / 2], ratios[NUM_PAIRS * 3 / 4]];
    // Of a median of n values: 1.25 standard deviations over the root of n, and quartiles are 1.35 of them apart.
    let spread = 1.25 * (quartiles[2] - quartiles[0]) / 1.35 / (NUM_PAIRS as f64).sqrt();
    eprintln!(
        "median step: {:.3} ms without, {:.3} ms with a client that never reads ({:+.2}%)",
        without * 1e3,
        with * 1e3,
        (with / without - 1.0) * 100.0
    );
    eprintln!(
        "the server's thread ran {:.1} us a step meanwhile, {:.3}% of a step",
        server_secs * 1e6,
        server_secs / without * 100.0
    );
    eprintln!(
        "ratio of {NUM_PAIRS} pairs of windows of {STEPS} steps: quartiles {quartiles:.4?}, spread of the middle one about {spread:.4}"
    );
}
