//! Answers in one piece: chats and completions, their choices, counts, ends and log-probabilities.

use serde_json::{Value, json};
use systems::serve::http::HttpConfig;

use crate::{
    client::{Site, ask, tokenizer, with},
    fake_model::Options,
};

#[test]
fn a_chat_is_answered_in_openais_shape() {
    let site = Site::new();
    let reply = site.post("/v1/chat/completions", &with(ask("the white whale"), json!({ "model": "hadal" })));
    assert_eq!(reply.status, 200, "{}", reply.text);
    let body = reply.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "hadal");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-") && body["created"].as_i64().unwrap() > 1_700_000_000);
    let choice = &body["choices"][0];
    // What the model says back begins with the blank after `User:`.
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": " the white whale" }));
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("stop")));
    let prompt = tokenizer().encode("User: the white whale\n\nAssistant:").unwrap().len();
    let said = tokenizer().encode(" the white whale").unwrap().len();
    let usage = json!({
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": { "cached_tokens": prompt / 2 },
    });
    assert_eq!(body["usage"], usage);
}

#[test]
fn several_prompts_have_several_answers_each() {
    let site = Site::new();
    let ids = tokenizer().encode("three").unwrap();
    for (prompt, texts) in [
        (json!("one"), vec!["one"]),
        (json!(["one", "two"]), vec!["one", "two"]),
        (json!(ids), vec!["three"]),
        (json!([ids, ids]), vec!["three", "three"]),
    ] {
        let body = site.post("/v1/completions", &json!({ "prompt": prompt, "n": 2, "best_of": 2 })).json();
        let expected: Vec<&str> = texts.iter().flat_map(|text| [*text; 2]).collect();
        let found: Vec<&Value> = body["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(found, expected, "{body}");
        let tokens = |text: &&str| tokenizer().encode(text).unwrap().len();
        assert_eq!(body["usage"]["prompt_tokens"], texts.iter().map(tokens).sum::<usize>());
        assert_eq!(body["usage"]["completion_tokens"], expected.iter().map(tokens).sum::<usize>());
        assert_eq!(body["object"], "text_completion");
    }
}

#[test]
fn answers_end_where_they_are_told() {
    let site = Site::new();
    let complete = |more: Value| {
        let body = with(json!({ "prompt": "a whale, a ship and a captain" }), more);
        let choice = site.post("/v1/completions", &body).json()["choices"][0].clone();
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    };
    let pair = |text: &str, reason: &str| (text.to_owned(), reason.to_owned());
    let long = json!({ "max_tokens": 100 });
    assert_eq!(complete(long.clone()), pair("a whale, a ship and a captain", "stop"));
    assert_eq!(complete(with(long.clone(), json!({ "stop": " and" }))), pair("a whale, a ship", "stop"));
    assert_eq!(complete(with(long.clone(), json!({ "stop": ["captain", "ship"] }))), pair("a whale, a ", "stop"));
    assert_eq!(complete(with(long.clone(), json!({ "stop": [] }))), pair("a whale, a ship and a captain", "stop"));
    let ids = tokenizer().encode("a whale, a ship and a captain").unwrap();
    let begin = tokenizer().decode(&ids[..3], true);
    assert_eq!(complete(json!({ "max_tokens": 3 })), pair(&begin, "length"));
    // No more is asked for than what completions have by default.
    let many = json!({ "prompt": "word ".repeat(30), "stop": null, "max_tokens": null });
    assert_eq!(site.post("/v1/completions", &many).json()["usage"]["completion_tokens"], 16);
    assert_eq!(complete(with(long, json!({ "stop_token_ids": [ids[3]] }))), pair(&begin, "stop"));
}

#[test]
fn log_probabilities_have_both_shapes() {
    let site = Site::new();
    let ids = tokenizer().encode("é whale").unwrap();
    let count = ids.len();
    let body = json!({ "prompt": "é whale", "logprobs": 2, "max_tokens": 50 });
    let found = site.post("/v1/completions", &body).json()["choices"][0]["logprobs"].clone();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(found[name].as_array().unwrap().len(), count, "{name}: {found}");
    }
    // The first letter is two tokens, which are no text of their own.
    assert_eq!(found["tokens"][0], "bytes:\\xc3");
    assert_eq!((&found["text_offset"][0], &found["text_offset"][2]), (&json!(0), &json!(1)));
    assert_eq!(found["token_logprobs"][0], -0.25);
    assert_eq!(found["top_logprobs"][2].as_object().unwrap().len(), 2);
    let chat = |more: Value| {
        let body = with(ask("é whale"), more);
        site.post("/v1/chat/completions", &body).json()["choices"][0]["logprobs"].clone()
    };
    let entries = chat(json!({ "logprobs": true, "top_logprobs": 3 }))["content"].clone();
    let bytes: Vec<u8> = entries.as_array().unwrap().iter().flat_map(|entry| bytes_of(&entry["bytes"])).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), " é whale");
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(entries[0]["top_logprobs"][0]["token"], entries[0]["token"]);
    assert_eq!(entries[0]["top_logprobs"][1]["logprob"], -1.25);
    assert_eq!(chat(json!({ "logprobs": true }))["content"][0]["top_logprobs"], json!([]));
    assert_eq!(chat(json!({ "logprobs": false })), Value::Null);
}

fn bytes_of(list: &Value) -> Vec<u8> {
    list.as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect()
}

#[test]
fn tools_go_through_the_template_and_come_back_as_calls() {
    let folder = tempfile::tempdir().unwrap();
    let template = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}User:{{ messages[-1].content }}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let site = Site::with_folder(HttpConfig::default(), Options::default(), folder.path());
    let call = r#"<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;
    let tools = json!({ "tools": [{ "type": "function", "function": { "name": "add", "parameters": {} } }] });
    let body = with(with(ask(&format!("Well. {call}")), tools.clone()), json!({ "max_tokens": 200 }));
    let reply = site.post("/v1/chat/completions", &body).json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{reply}");
    assert_eq!(choice["message"]["content"], "Well. ");
    assert_eq!(choice["message"]["tool_calls"][0]["function"], json!({ "name": "add", "arguments": "{\"a\":1}" }));
    let with_tools = tokenizer().encode(&format!("[add]User:Well. {call}")).unwrap().len();
    assert_eq!(reply["usage"]["prompt_tokens"], with_tools);
    // Without tools, or with `none`, the same text is text.
    for more in [json!({ "tools": null }), json!({ "tool_choice": "none" })] {
        let reply = site.post("/v1/chat/completions", &with(body.clone(), more)).json();
        assert_eq!(reply["choices"][0]["message"]["content"], format!("Well. {call}"));
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    }
    let error = site.post("/v1/chat/completions", &with(body.clone(), json!({ "tool_choice": "required" }))).error(400);
    assert_eq!(error["param"], "tool_choice");
    // In pieces: the text before, then the call in one.
    let pieces = site.stream("/v1/chat/completions", &body);
    let deltas: Vec<&Value> = pieces.iter().map(|piece| &piece["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, "Well. ");
    let calls: Vec<&Value> =
        deltas.iter().filter(|delta| delta["tool_calls"].is_array()).map(|delta| &delta["tool_calls"][0]).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0]["index"], &calls[0]["function"]["arguments"]), (&json!(0), &json!("{\"a\":1}")));
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn an_answer_has_all_the_room_there_is() {
    let site = Site::new();
    let text = "whale ".repeat(60);
    let reply = site.post("/v1/chat/completions", &ask(&text)).json();
    assert_eq!(reply["choices"][0]["message"]["content"], format!(" {text}"));
    let error = site.post("/v1/chat/completions", &ask(&"whale ".repeat(600))).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(error["message"].as_str().unwrap().contains("expected at most 512 tokens"), "{error}");
}
