//! Models, embeddings, tokens, routing, metrics, the page; and ways that there are not.

use serde_json::{Value, json};
use systems::serve::http::HttpConfig;

use crate::{
    client::{Site, agent, ask, tokenizer, whole},
    fake_model::{Options, embedding},
};

#[test]
fn the_model_is_listed_under_its_name() {
    let site = Site::with(HttpConfig { model_name: "runs/whale".into(), ..HttpConfig::default() }, Options::default());
    let list = site.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(
        (&model["id"], &model["object"], &model["max_model_len"]),
        (&json!("runs/whale"), &json!("model"), &json!(512))
    );
    assert_eq!(site.get("/v1/models/runs/whale").json(), *model);
    assert_eq!(site.get("/v1/models/other").error(404)["code"], "model_not_found");
    let body = json!({ "model": "other", "prompt": "x" });
    assert_eq!(site.post("/v1/completions", &body).error(404)["code"], "model_not_found");
}

#[test]
fn embeddings_are_numbers_or_base64() {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let site = Site::new();
    let ids = |text: &str| tokenizer().encode(text).unwrap();
    let reply = site.post("/v1/embeddings", &json!({ "input": ["a whale", "a ship"] })).json();
    for (index, text) in ["a whale", "a ship"].into_iter().enumerate() {
        let found: Vec<f32> = serde_json::from_value(reply["data"][index]["embedding"].clone()).unwrap();
        assert_eq!(found, embedding(&ids(text)));
        assert_eq!(reply["data"][index]["index"], index);
    }
    let total = ids("a whale").len() + ids("a ship").len();
    assert_eq!(reply["usage"], json!({ "prompt_tokens": total, "total_tokens": total }));
    let body = json!({ "input": ids("a whale"), "encoding_format": "base64", "dimensions": 8 });
    let coded = site.post("/v1/embeddings", &body).json()["data"][0]["embedding"].clone();
    let bytes = BASE64_STANDARD.decode(coded.as_str().unwrap()).unwrap();
    let found: Vec<f32> = bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!(found, embedding(&ids("a whale")));
    for (more, param) in
        [(json!({ "encoding_format": "hex" }), "encoding_format"), (json!({ "dimensions": 4 }), "dimensions")]
    {
        let body = crate::client::with(json!({ "input": "x" }), more);
        assert_eq!(site.post("/v1/embeddings", &body).error(400)["param"], param);
    }
}

#[test]
fn text_goes_to_tokens_and_back() {
    let site = Site::new();
    let text = "the é whale";
    let ids = tokenizer().encode(text).unwrap();
    for name in ["prompt", "text"] {
        let reply = site.post("/tokenize", &json!({ name: text, "return_token_strs": true })).json();
        assert_eq!((&reply["tokens"], &reply["count"]), (&json!(ids), &json!(ids.len())));
        assert_eq!(reply["max_model_len"], 512);
        assert_eq!(reply["token_strs"].as_array().unwrap().len(), ids.len());
    }
    assert_eq!(site.post("/detokenize", &json!({ "tokens": ids })).json(), json!({ "prompt": text }));
    let chat = tokenizer().encode("User: hi\n\nAssistant:").unwrap();
    assert_eq!(site.post("/tokenize", &ask("hi")).json()["tokens"], json!(chat));
    assert_eq!(site.post("/detokenize", &json!({ "tokens": [1, 600] })).error(400)["param"], "tokens");
    assert_eq!(site.post("/tokenize", &json!({})).error(400)["param"], "prompt");
}

#[test]
fn texts_begin_as_the_model_was_trained() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        json!({ "add_bos_token": true, "bos_token": { "content": "<|endoftext|>" }, "eos_token": "<|endoftext|>" });
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let site = Site::with_folder(HttpConfig::default(), Options::default(), folder.path());
    let tokens = |more: Value| {
        site.post("/tokenize", &crate::client::with(json!({ "prompt": "a" }), more)).json()["tokens"].clone()
    };
    let id = tokenizer().encode("a").unwrap()[0];
    assert_eq!(tokens(json!({})), json!([0, id]));
    assert_eq!(tokens(json!({ "add_special_tokens": false })), json!([id]));
    assert_eq!(site.post("/v1/completions", &json!({ "prompt": "a" })).json()["usage"]["prompt_tokens"], 2);
    assert_eq!(site.post("/v1/completions", &json!({ "prompt": [id] })).json()["usage"]["prompt_tokens"], 1);
}

#[test]
fn experts_and_requests_are_counted() {
    let site = Site::new();
    site.post("/v1/chat/completions", &ask("a whale and a ship"));
    crate::client::wait_for("the count", || site.model.service.stats().counters.num_finished.contains_key("stop"));
    let routing = site.get("/v1/routing").json();
    let layers = routing["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    let said = tokenizer().encode(" a whale and a ship").unwrap().len() as u64;
    for layer in layers {
        let total: Vec<u64> = serde_json::from_value(layer["total"].clone()).unwrap();
        assert_eq!(total.iter().sum::<u64>(), said * 4);
        let max_vio = *total.iter().max().unwrap() as f64 * 32.0 / (said * 4) as f64 - 1.0;
        assert!((layer["max_vio"].as_f64().unwrap() - max_vio).abs() < 1e-12);
    }
    let reply = site.get("/metrics");
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for line in [
        format!("hadal:generation_tokens_total{{model_name=\"hadal\"}} {said}"),
        "hadal:num_requests_running{model_name=\"hadal\"} 0.0".into(),
        "hadal:request_success_total{model_name=\"hadal\",finished_reason=\"stop\"} 1".into(),
        "hadal:time_to_first_token_seconds_count{model_name=\"hadal\"} 1".into(),
        format!("hadal:inter_token_latency_seconds_count{{model_name=\"hadal\"}} {}", said - 1),
        "hadal:e2e_request_latency_seconds_count{model_name=\"hadal\"} 1".into(),
    ] {
        assert!(reply.text.lines().any(|found| found == line), "{line}\n{}", reply.text);
    }
}

#[test]
fn the_page_asks_nothing_of_anybody_else() {
    let reply = Site::new().get("/");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = reply.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    // What is run and worn is named by its digest, for this page and the one that asks for the key.
    assert_eq!(policy.matches("'sha256-").count(), 4, "{policy}");
    for elsewhere in ["http://", "https://", "//cdn", "@import"] {
        assert!(!reply.text.contains(elsewhere), "the page has {elsewhere}");
    }
}

#[test]
fn wrong_ways_are_openai_errors() {
    let site = Site::new();
    assert_eq!(site.get("/v1/nothing").error(404)["code"], "not_found");
    assert_eq!(site.get("/v1/chat/completions").error(405)["code"], "method_not_allowed");
    assert_eq!(whole(agent().delete(site.url("/v1/models")).call().unwrap()).error(405)["code"], "method_not_allowed");
    let kinds = [Some("text/plain"), Some("application/x-www-form-urlencoded"), None];
    for kind in kinds {
        let mut request = agent().post(site.url("/v1/completions"));
        if let Some(kind) = kind {
            request = request.header("Content-Type", kind);
        }
        let reply = whole(request.send(br#"{"prompt": "x"}"#.as_slice()).unwrap());
        assert_eq!(reply.error(415)["code"], "unsupported_media_type", "{kind:?}");
    }
    let request = agent().post(site.url("/v1/completions")).header("Content-Type", "Application/JSON; charset=utf-8");
    assert_eq!(whole(request.send(br#"{"prompt": "x"}"#.as_slice()).unwrap()).status, 200);
}
