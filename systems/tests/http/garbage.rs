//! What no client should send: each is told what is wrong as an OpenAI error, and the server lives.

use std::{
    io::{Read, Write},
    time::Duration,
};

use rand::{Rng, RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::client::{Reply, Site, agent, ask, whole, with};

const POSTS: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"];

fn send(site: &Site, path: &str, body: &[u8]) -> Reply {
    let request = agent().post(site.url(path)).header("Content-Type", "application/json");
    whole(request.send(body).unwrap())
}

#[test]
fn bodies_that_are_no_requests() {
    let site = Site::new();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut bodies: Vec<Vec<u8>> = vec![
        Vec::new(),
        b" ".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"17".to_vec(),
        b"\"text\"".to_vec(),
        b"{\"prompt\": \"x\"".to_vec(),
        b"{\"prompt\": \"x\"} trailing".to_vec(),
        b"{\"prompt\": \"\xff\xfe\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"{\"prompt\": \"\\ud800\"}".to_vec(),
        b"{\"temperature\": NaN}".to_vec(),
        b"{\"temperature\": Infinity}".to_vec(),
        b"{\"temperature\": 1e999}".to_vec(),
        b"{'prompt': 'x'}".to_vec(),
        b"\0\0\0\0".to_vec(),
        "[".repeat(10_000).into_bytes(),
        format!("{{\"prompt\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000)).into_bytes(),
        "{\"a\":".repeat(10_000).into_bytes(),
    ];
    for length in [1, 10, 1000, 100_000] {
        for _ in 0..10 {
            let mut body = vec![0; length];
            random.fill_bytes(&mut body);
            bodies.push(body);
        }
    }
    // Requests with a byte changed: those that are still requests may be answered.
    let good = ask("a whale").to_string().into_bytes();
    for _ in 0..100 {
        let mut body = good.clone();
        let at = random.random_range(0..body.len());
        body[at] = random.random();
        let reply = send(&site, "/v1/chat/completions", &body);
        if reply.status != 200 {
            reply.error(400);
        }
    }
    for path in POSTS {
        for body in &bodies {
            send(&site, path, body).error(400);
        }
    }
    site.assert_lives();
}

#[test]
fn parameters_out_of_range_or_of_another_type() {
    let site = Site::new();
    let huge: Value = serde_json::from_str("123456789012345678901234567890").unwrap();
    let deep = json!({ "a": { "b": [1] } });
    let numbers = |least: f64, most: f64| {
        vec![
            json!(least - 0.5),
            json!(most + 0.5),
            json!(1e308),
            json!(-1e308),
            json!("1"),
            json!([1]),
            json!(true),
            deep.clone(),
        ]
    };
    let counts =
        |most: u64| vec![json!(-1), json!(most + 1), json!(1.5), huge.clone(), json!("1"), json!(true), deep.clone()];
    let both: Vec<(&str, Vec<Value>)> = vec![
        ("temperature", numbers(0.0, 2.0)),
        ("top_p", numbers(0.0, 1.0)),
        ("min_p", numbers(0.0, 1.0)),
        ("presence_penalty", numbers(-2.0, 2.0)),
        ("frequency_penalty", numbers(-2.0, 2.0)),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(1e9), json!("1")]),
        ("top_k", vec![json!(-2), json!(1u64 << 40), json!(0.5), json!("1")]),
        ("n", [counts(128), vec![json!(0)]].concat()),
        ("max_tokens", [counts(1 << 40), vec![json!(0)]].concat()),
        ("seed", vec![huge.clone(), json!(0.5), json!("7"), json!([])]),
        ("stream", vec![json!(1), json!("true"), json!([])]),
        ("stream_options", vec![json!(true), json!([]), json!({})]),
        ("stop", vec![json!(1), json!([1]), json!(""), json!([""]), json!(["a", "b", "c", "d", "e"]), deep.clone()]),
        ("stop_token_ids", vec![json!(1), json!([-1]), json!(["a"]), json!([1u64 << 32])]),
        (
            "logit_bias",
            vec![
                json!([]),
                json!({ "a": 1 }),
                json!({ "-1": 1 }),
                json!({ "600": 1 }),
                json!({ "1": 101 }),
                json!({ "1": "1" }),
            ],
        ),
        ("model", vec![json!(1), json!({})]),
        ("user", vec![json!(1)]),
        ("priority", vec![json!(1u64 << 40), json!("high")]),
        ("ignore_eos", vec![json!("no")]),
        ("response_format", vec![json!("json"), json!({ "type": "json_schema" })]),
        ("response_format.type", vec![json!({ "type": "xml" }), json!({ "type": 1 })]),
        ("response_format.json_schema.schema", vec![json!({ "type": "json_schema", "json_schema": { "schema": 1 } })]),
        ("stream_options.include_usage", vec![json!({ "include_usage": 1 })]),
    ];
    let chat: Vec<(&str, Vec<Value>)> = vec![
        ("messages", vec![json!([]), json!("hi"), json!({}), json!(null)]),
        ("messages[0]", vec![json!(["hi"]), json!([null])]),
        ("messages[0].role", vec![json!([{}]), json!([{ "role": 1 }]), json!([{ "role": "" }])]),
        (
            "messages[0].content",
            vec![
                json!([{ "role": "user" }]),
                json!([{ "role": "user", "content": 1 }]),
                json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            ],
        ),
        ("logprobs", vec![json!(1), json!("yes")]),
        ("top_logprobs", vec![json!(1), json!(-1), json!(21)]),
        ("max_completion_tokens", counts(1 << 40)),
        ("tools", vec![json!({}), json!([1]), json!([{ "type": "function" }])]),
        ("tool_choice", vec![json!("required"), json!(1), json!({ "type": "function" })]),
        ("chat_template_kwargs", vec![json!(1)]),
    ];
    let complete: Vec<(&str, Vec<Value>)> = vec![
        (
            "prompt",
            vec![
                json!(null),
                json!(1),
                json!({}),
                json!([]),
                json!([null]),
                json!([1, "a"]),
                json!([-1]),
                json!([1.5]),
                json!([[1], 2]),
                json!([["a"]]),
                json!(vec!["a"; 129]),
            ],
        ),
        ("logprobs", vec![json!(true), json!(-1), json!(21)]),
        ("best_of", vec![json!(2), json!(0), json!("1")]),
        ("echo", vec![json!(true), json!(1)]),
        ("suffix", vec![json!("end"), json!(1)]),
    ];
    let chat_base = ask("a whale");
    let complete_base = json!({ "prompt": "a whale" });
    for (path, base, own) in [("/v1/chat/completions", chat_base, chat), ("/v1/completions", complete_base, complete)] {
        for (name, values) in both.iter().chain(&own) {
            for value in values {
                let field = name.split(['[', '.']).next().unwrap();
                let mut body = with(base.clone(), json!({ field: value }));
                if name.starts_with("stream_options.") {
                    body["stream"] = true.into();
                }
                let reply = site.post(path, &body);
                let error = reply.error(400);
                assert_eq!(error["param"], *name, "{path} {name} = {value}: {error}");
                assert!(error["message"].as_str().unwrap().starts_with(name), "{error}");
            }
        }
    }
    // Tokens that there are not, and prompts without any.
    for prompt in [json!([600]), json!([[u32::MAX]]), json!(""), json!([[]])] {
        assert_eq!(site.post("/v1/completions", &json!({ "prompt": prompt })).error(400)["code"], "invalid_prompt");
    }
    // More answers than there may be, though each number alone is all right.
    let many = json!({ "prompt": vec!["a"; 65], "n": 2 });
    assert_eq!(site.post("/v1/completions", &many).error(400)["param"], "n");
    // What nobody knows is left alone.
    let unknown = with(ask("a whale"), json!({ "metadata": { "a": 1 }, "store": true, "whatever": [1, 2] }));
    assert_eq!(site.post("/v1/chat/completions", &unknown).status, 200);
    site.assert_lives();
}

#[test]
fn a_body_that_is_too_large_is_not_read() {
    let site = Site::new();
    let head = |length: &str| {
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        )
    };
    // Announced: answered before any of it comes.
    let mut stream = site.connect();
    stream.write_all(head("Content-Length: 104857600").as_bytes()).unwrap();
    let mut begin = vec![0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(begin, b"HTTP/1.1 413");
    drop(stream);
    // Sent all the same: the answer arrives.
    let mut stream = site.connect();
    stream.write_all(head("Content-Length: 104857600").as_bytes()).unwrap();
    let chunk = vec![b'x'; 1 << 20];
    let num_sent = (0..100).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    let reply = String::from_utf8_lossy(&reply);
    assert!(reply.starts_with("HTTP/1.1 413") && reply.contains("body_too_large"), "{num_sent} MiB sent: {reply}");
    // Not announced: it is read up to the limit.
    let mut stream = site.connect();
    stream.write_all(head("Transfer-Encoding: chunked").as_bytes()).unwrap();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let mut num_sent = 0;
    while num_sent < 1600 && stream.write_all(chunk.as_bytes()).is_ok() {
        num_sent += 1;
    }
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    let reply = String::from_utf8_lossy(&reply);
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
    // Just within the limit is all right.
    let text = json!({ "text": "x".repeat((4 << 20) - 100) }).to_string();
    assert_eq!(send(&site, "/detokenize", text.as_bytes()).error(400)["param"], "tokens");
    site.assert_lives();
}

#[test]
fn what_is_no_http() {
    let site = Site::new();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(8);
    for length in [1, 20, 5000] {
        let mut bytes = vec![0; length];
        random.fill_bytes(&mut bytes);
        bytes.extend(b"\r\n\r\n");
        let reply = site.raw(&bytes);
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 400"), "{reply}");
    }
    let long = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(100_000));
    let reply = site.raw(long.as_bytes());
    assert!(reply.starts_with("HTTP/1.1 4"), "{reply}");
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(5000));
    let reply = site.raw(many.as_bytes());
    assert!(reply.starts_with("HTTP/1.1 4"), "{reply}");
    // One that goes in the middle of its body.
    for _ in 0..20 {
        let mut stream = site.connect();
        stream.write_all(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{").unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    site.assert_lives();
}
