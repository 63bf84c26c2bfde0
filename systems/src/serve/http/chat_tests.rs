//! Templates as transformers renders them: the expected texts were made by Jinja2 itself, see `tests/serve/make_chat_golden.py`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::json;

use super::*;

const GOLDEN: &str = include_str!("../../../../tests/serve/chat_golden.json");

fn specials() -> Map<String, Value> {
    [("bos_token".to_owned(), json!("<s>")), ("eos_token".to_owned(), json!("</s>"))].into_iter().collect()
}

fn template(text: &str) -> ChatTemplate {
    ChatTemplate::new(vec![("default".into(), text.into())], specials()).unwrap()
}

fn render(chat: &ChatTemplate, messages: Value, options: Value) -> Result<String, String> {
    chat.render(messages.as_array().unwrap(), None, options.as_object().unwrap(), true)
}

#[test]
fn chats_are_rendered_as_by_jinja() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 64);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let chat = template(golden["templates"][name].as_str().unwrap());
        let messages = case["messages"].as_array().unwrap();
        let tools = case["tools"].as_array().map(Vec::as_slice);
        let found = chat.render(messages, tools, &Map::new(), case["is_open"].as_bool().unwrap());
        let found = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found, case["expected"].as_str().unwrap(), "{name}, {} messages", messages.len());
    }
}

#[test]
fn templates_say_what_they_refuse() {
    let chat = template(
        "{% for m in messages %}\n{% if m.role != 'user' %}{{ raise_exception('roles: ' + m.role) }}{% endif %}{% endfor %}",
    );
    assert_eq!(render(&chat, json!([{ "role": "user", "content": "" }]), json!({})).unwrap(), "");
    let error = render(&chat, json!([{ "role": "judge", "content": "" }]), json!({})).unwrap_err();
    assert_eq!(error, "roles: judge (the chat template, line 2)");
    assert!(ChatTemplate::new(vec![("default".into(), "{% for %}".into())], Map::new()).is_err());
}

#[test]
fn a_template_ends() {
    let chat = template("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}");
    assert!(render(&chat, json!([]), json!({})).is_err());
    let chat = template("{{ 'x' * 1000000000000 }}");
    assert!(render(&chat, json!([]), json!({})).is_err());
    let chat = template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    assert!(render(&chat, json!([]), json!({})).is_err());
}

#[test]
fn options_and_the_date_are_there() {
    let chat = template("{{ thinks }} {{ bos_token }} {{ strftime_now('%Y-%m-%d') }}");
    let text = render(&chat, json!([]), json!({ "thinks": false, "bos_token": "mine", "messages": 1 })).unwrap();
    let (begin, date) = text.rsplit_once(' ').unwrap();
    // What a request says of a variable goes before the checkpoint's; messages are the messages.
    assert_eq!(begin, "False mine");
    let digits: Vec<&str> = date.split('-').collect();
    assert_eq!(digits.iter().map(|part| part.len()).collect::<Vec<_>>(), [4, 2, 2], "{date}");
}

#[test]
fn a_folder_says_how_its_model_chats() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let say = |text: &str, tools: Option<&[Value]>| {
        let chat = ChatTemplate::open(folder.path(), None).unwrap();
        let messages = [json!({ "role": "user", "content": text })];
        (chat.render(&messages, tools, &Map::new(), true).unwrap(), chat.stops().len())
    };
    // Nothing there: a transcript.
    assert_eq!(say("hi", None), ("User: hi\n\nAssistant:".into(), 2));
    let config = |value: Value| fs::write(path("tokenizer_config.json"), value.to_string()).unwrap();
    config(json!({ "bos_token": null, "model_max_length": 5 }));
    assert_eq!(say("hi", None), ("User: hi\n\nAssistant:".into(), 2));
    // A text, and special tokens of both kinds.
    let text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    config(
        json!({ "chat_template": text, "bos_token": { "content": "<b>" }, "eos_token": "<e>", "add_bos_token": true }),
    );
    assert_eq!(say("hi", None), ("<b>hi<e>".into(), 0));
    let chat = ChatTemplate::open(folder.path(), None).unwrap();
    assert_eq!((chat.begin_token(), chat.end_token()), (Some("<b>"), Some("<e>")));
    // Several, by name.
    config(
        json!({ "chat_template": [{ "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools" }] }),
    );
    assert_eq!(say("hi", None).0, "plain");
    assert_eq!(say("hi", Some(&[json!({})])).0, "tools");
    // A file of its own goes before, one that is given goes before both.
    fs::write(path("chat_template.jinja"), "own\n").unwrap();
    assert_eq!(say("hi", None).0, "own");
    fs::write(path("given.jinja"), "given").unwrap();
    let chat = ChatTemplate::open(folder.path(), Some(&path("given.jinja"))).unwrap();
    assert_eq!(chat.render(&[], None, &Map::new(), true).unwrap(), "given");
    fs::remove_file(path("chat_template.jinja")).unwrap();
    for (bad, expected) in [
        (json!({ "chat_template": 1 }), "expected a text, found 1"),
        (json!({ "chat_template": [{ "name": "default" }] }), "expected objects with a `name` and a `template`"),
        (json!({ "chat_template": "a\n{{ b" }), "line 2"),
    ] {
        config(bad);
        let error = ChatTemplate::open(folder.path(), None).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: ") && error.contains(expected), "{error}");
    }
    let error = ChatTemplate::open(folder.path(), Some(&path("none.jinja"))).unwrap_err().to_string();
    assert!(error.starts_with("cannot read ") && error.contains("none.jinja"), "{error}");
}

#[test]
fn a_folder_says_what_ends_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(end_tokens(folder.path()).unwrap(), Vec::<u32>::new());
    for (value, expected) in [
        (json!({}), Some(vec![])),
        (json!({ "eos_token_id": 7 }), Some(vec![7])),
        (json!({ "eos_token_id": [7, 9] }), Some(vec![7, 9])),
        (json!({ "eos_token_id": [-1] }), None),
        (json!({ "eos_token_id": "a" }), None),
    ] {
        fs::write(folder.path().join("generation_config.json"), value.to_string()).unwrap();
        assert_eq!(end_tokens(folder.path()).ok(), expected, "{value}");
    }
}
