//! Answers in pieces, and clients that go before the end.

use std::time::Duration;

use kernels::clock::now_nanos;
use serde_json::{Value, json};
use systems::serve::http::HttpConfig;

use crate::{
    client::{Pieces, Site, ask, wait_for, with},
    fake_model::Options,
};

fn text(pieces: &[Value], index: usize, of: impl Fn(&Value) -> Option<&str>) -> String {
    let choices = pieces.iter().flat_map(|piece| piece["choices"].as_array().unwrap());
    choices.filter(|choice| choice["index"] == index).filter_map(of).collect()
}

#[test]
fn a_streamed_chat_is_the_whole_one_in_pieces() {
    let site = Site::new();
    let body = with(ask("the white whale"), json!({ "n": 2, "stream_options": { "include_usage": true } }));
    let pieces = site.stream("/v1/chat/completions", &body);
    let first = &pieces[0]["choices"][0];
    assert_eq!(first["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk" && piece["id"] == pieces[0]["id"]));
    for index in 0..2 {
        let found = text(&pieces, index, |choice| choice["delta"]["content"].as_str());
        assert_eq!(found, " the white whale");
        let of_one: Vec<&Value> = pieces
            .iter()
            .filter_map(|piece| piece["choices"].as_array().unwrap().iter().find(|choice| choice["index"] == index))
            .collect();
        assert!(of_one.len() > 3, "{of_one:?}");
        let (last, before) = of_one.split_last().unwrap();
        assert_eq!((&last["finish_reason"], &last["delta"]), (&json!("stop"), &json!({})));
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
    }
    let (last, before) = pieces.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    let whole = with(body, json!({ "stream": false, "stream_options": null }));
    assert_eq!(last["usage"], site.post("/v1/chat/completions", &whole).json()["usage"]);
    assert!(before.iter().all(|piece| piece["usage"].is_null()));
    // Nobody asked: nothing is said of usage.
    let pieces = site.stream("/v1/chat/completions", &ask("the white whale"));
    assert!(pieces.iter().all(|piece| piece.get("usage").is_none()));
}

#[test]
fn a_streamed_completion_is_the_whole_one_in_pieces() {
    let site = Site::new();
    let body = json!({ "prompt": ["é whale", "a ship and"], "logprobs": 1, "max_tokens": 40, "stop": " and" });
    let whole = site.post("/v1/completions", &body).json();
    let pieces = site.stream("/v1/completions", &body);
    for (index, expected) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(text(&pieces, index, |choice| choice["text"].as_str()), expected["text"].as_str().unwrap());
        let choices = pieces.iter().flat_map(|piece| piece["choices"].as_array().unwrap());
        let of_one = choices.filter(|choice| choice["index"] == index);
        let offsets: Vec<&Value> =
            of_one.filter_map(|choice| choice["logprobs"]["text_offset"].as_array()).flatten().collect();
        let expected: Vec<&Value> = expected["logprobs"]["text_offset"].as_array().unwrap().iter().collect();
        assert_eq!(offsets, expected);
    }
}

#[test]
fn pieces_come_as_they_are_made() {
    let options = Options { tick: Duration::from_millis(100), ..Options::default() };
    let site = Site::with(HttpConfig::default(), options);
    let body = with(ask("one two three four five six"), json!({ "stream": true }));
    let mut pieces = Pieces::new(site.open("/v1/chat/completions", &body));
    pieces.next().unwrap();
    pieces.next().unwrap();
    let begin = now_nanos();
    let num_more = pieces.count();
    let secs = (now_nanos() - begin) as f64 * 1e-9;
    // Held back to the end, all of them would be there at once.
    assert!(num_more >= 5 && secs > 0.05 * num_more as f64, "{num_more} more pieces in {secs} s");
}

#[test]
fn who_goes_takes_the_answer_along() {
    let options = Options { tick: Duration::from_millis(20), ..Options::default() };
    let site = Site::with(HttpConfig::default(), options);
    let long = "whale ".repeat(60);
    let aborted = || site.model.service.stats().counters.num_finished.get("abort").copied().unwrap_or(0);
    // In pieces, after the second.
    let mut pieces =
        Pieces::new(site.open("/v1/chat/completions", &with(ask(&long), json!({ "stream": true, "n": 3 }))));
    pieces.next().unwrap();
    pieces.next().unwrap();
    drop(pieces);
    wait_for("the end of three answers", || aborted() == 3);
    // In one piece, before it is there.
    let body = ask(&long).to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let mut stream = site.connect();
    std::io::Write::write_all(&mut stream, format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes())
        .unwrap();
    wait_for("a fourth answer", || site.model.service.stats().num_running == 1);
    drop(stream);
    wait_for("its end", || aborted() == 4);
    wait_for("an idle model", || site.model.service.stats().num_running == 0);
}
