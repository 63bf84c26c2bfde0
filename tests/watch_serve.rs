//! A model that serves, watched from another process, through the binary: its requests as entities, its steps as snapshots, a pause
//! that holds an answer back, and files that are gone when it ends.
//!
//! Only loopback addresses are used.
#![cfg(feature = "remote")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use engine::remote::client::{Client, ClientEvent};
use serde_json::{Value, json};

fn hadal(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    command.args(args).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A checkpoint of two steps, in `dir`.
fn train(dir: &Path) {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenes/tiny.ron").display().to_string();
    let sets = [
        "--set=train.steps=2",
        "--set=schedule=Constant(lr: 1e-3)",
        "--set=routing.bias_warm_down_steps=0",
        "--set=telemetry.trace_steps=None",
        "--set=eval=None",
        "--set=sample=None",
    ];
    let done = hadal(dir, &[&["run", &*tiny][..], &sets].concat()).output().expect("the program starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// A server, killed if the test fails.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What comes back for a completion of so many tokens; blocks until it is there.
fn complete(address: &str, max_tokens: usize) -> Value {
    let body = json!({ "prompt": "Call me", "max_tokens": max_tokens, "ignore_eos": true }).to_string();
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("it listens");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    let body = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no body: {answer}")).1;
    serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"))
}

/// The first event of which `want` makes something.
fn wait<T>(client: &mut Client, mut want: impl FnMut(&ClientEvent) -> Option<T>) -> T {
    for _ in 0..6000 {
        match client.try_event() {
            Some(event) => {
                if let Some(found) = want(&event) {
                    return found;
                }
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    panic!("it does not come");
}

fn ask(client: &mut Client, method: &str, params: Value) -> Result<Value, String> {
    let asked = client.call(method, params);
    wait(client, |event| match event {
        ClientEvent::Reply { id, result } if *id == asked => Some(result.clone().map_err(|error| error.message)),
        _ => None,
    })
}

#[test]
fn a_request_is_seen_while_it_is_answered() {
    let dir = tempfile::tempdir().expect("a folder");
    train(dir.path());
    let args = ["serve", "runs/tiny/latest", "--port", "0", "--remote", "127.0.0.1:0", "--remote-dir", "door"];
    let mut served = Served(hadal(dir.path(), &args).spawn().expect("the program starts"));
    let mut lines = BufReader::new(served.0.stderr.take().expect("piped")).lines().map_while(Result::ok);
    let (mut http, mut url) = (None, None);
    for line in lines.by_ref() {
        if let Some((_, rest)) = line.split_once("listening on http://") {
            http = rest.split(';').next().map(str::to_owned);
        }
        if let Some((_, rest)) = line.split_once("listening at ") {
            assert!(rest.ends_with("door/remote.token"), "{line}");
            url = rest.split(';').next().map(str::to_owned);
        }
        if line.starts_with("serving `tiny`") {
            break;
        }
    }
    let drain =
        std::thread::Builder::new().name("stderr".into()).spawn(move || lines.for_each(drop)).expect("a thread");
    let (http, url) = (http.expect("an address"), url.expect("an address to watch at"));
    let token_file = dir.path().join("door/remote.token");
    assert_eq!(token_file.metadata().expect("the token").permissions().mode() & 0o777, 0o600);
    let token = std::fs::read_to_string(&token_file).expect("the token").trim().to_owned();

    let mut client = Client::connect(&url, Some(token), Arc::new(|| {}));
    let name = wait(&mut client, |event| match event {
        ClientEvent::Connected { name } => Some(name.clone()),
        _ => None,
    });
    assert_eq!(name, "tiny");
    // With nobody asking, there are no steps to tell.
    let idle = ask(&mut client, "run.status", Value::Null).expect("a status");
    assert_eq!((&idle["step"], &idle["num_running"]), (&json!(0), &json!(0)));
    // Paused, so that the request is there as long as it is looked at; and a step at a time.
    ask(&mut client, "run.pause", Value::Null).expect("it pauses");
    let address = http.clone();
    let answer =
        std::thread::Builder::new().name("client".into()).spawn(move || complete(&address, 12)).expect("a thread");
    let status = ask(&mut client, "run.step", Value::Null).expect("it steps");
    assert_eq!(
        (&status["work"], &status["state"], &status["num_running"]),
        (&json!("serve"), &json!("paused"), &json!(1))
    );
    let listed = ask(&mut client, "world.list", json!({ "with": "Request" })).expect("entities");
    let entity = &listed["entities"][0];
    assert_eq!((&entity["name"], listed["entities"].as_array().map(Vec::len)), (&json!("request 0"), Some(1)));
    let seen = ask(&mut client, "world.get", json!({ "entity": entity["entity"] })).expect("an entity");
    let view = &seen["components"]["Request"];
    let of = |name: &str| view[name].as_u64().unwrap_or_else(|| panic!("{name}: {seen}"));
    assert_eq!((&view["state"], of("max_new_tokens"), of("num_generated_tokens")), (&json!("running"), 12, 1));
    assert_eq!(of("num_computed_tokens"), of("num_prompt_tokens"), "the first step computes the prompt");
    assert!(!seen.to_string().contains("Call"), "no text leaves this way: {seen}");
    assert!(ask(&mut client, "run.set", json!({ "path": "lr", "value": 1e-3 })).expect_err("no rate").contains("`lr`"));
    assert!(ask(&mut client, "run.checkpoint", Value::Null).expect_err("nothing to save").contains("no method"));

    ask(&mut client, "run.resume", Value::Null).expect("it goes on");
    let step = wait(&mut client, |event| match event {
        ClientEvent::Snapshot(snapshot) if snapshot.scalar("num_generated_tokens") == Some(1.0) => {
            Some(snapshot.clone())
        }
        _ => None,
    });
    assert!(step.spans.iter().any(|span| span.kind.0 == "experts_forward"), "tasks by their kinds");
    let loads = &step.histograms.iter().find(|(name, _)| name == "load/layer 1").expect("loads").1;
    let layers = step.histograms.iter().filter(|(name, _)| name.starts_with("load/")).map(|(name, _)| name.as_str());
    assert_eq!(
        layers.collect::<Vec<_>>(),
        ["load/layer 1", "load/layer 2"],
        "and none of the MTP module, which is not asked"
    );
    let num_tokens = step.scalar("num_step_tokens").expect("a count");
    assert_eq!((loads.len(), loads.iter().sum::<f64>()), (8, 2.0 * num_tokens));
    assert!(step.scalar("cache_usage").is_some_and(|share| (0.0..=1.0).contains(&share)));
    let answer = answer.join().expect("no panic");
    assert_eq!(answer["usage"]["completion_tokens"], 12, "{answer}");

    ask(&mut client, "run.stop", Value::Null).expect("it stops");
    let status = served.0.wait().expect("a status");
    assert_eq!(status.code(), Some(0), "stopped on request is no failure");
    assert!(!dir.path().join("door").exists(), "nobody listens any more");
    drain.join().expect("no panic");
}
