//! Texts drawn uniformly from what masks allow are checked by another implementation of JSON schemas.

#![expect(clippy::unwrap_used, reason = "tests")]
use rand::{RngExt as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

fn tokenizer() -> Tokenizer {
    let text =
        "{\"name\": \"naïve café 海🐋\", \"age\": 12, \"tags\": [\"a\", \"b\"], \"is_new\": true, \"x\": null}\n"
            .repeat(20);
    Tokenizer::train(&[text], 400).unwrap()
}

fn vocabulary(tokenizer: &Tokenizer) -> Vocabulary {
    // Of a model with rows that no token has.
    Vocabulary::new(tokenizer, 419, &[]).unwrap()
}

/// The tokens that a mask allows.
fn allowed(mask: &[u32]) -> Vec<u32> {
    (0..mask.len() as u32 * 32).filter(|token| mask[*token as usize / 32] >> (token % 32) & 1 == 1).collect()
}

/// A text of at most `max_tokens`, each drawn uniformly, and how many tokens it took; `None` if it was not complete by then.
/// After a quarter of them, whatever ends something is preferred, so that texts without bound end.
fn draw(constraint: &mut Constraint, tokenizer: &Tokenizer, rng: &mut ChaCha8Rng, max_tokens: usize) -> Option<String> {
    let mut ids = Vec::new();
    while !constraint.is_finished() {
        if ids.len() == max_tokens {
            return None;
        }
        let mask = constraint.mask().unwrap();
        assert_eq!(mask.len(), 419usize.div_ceil(32));
        let tokens = allowed(&mask);
        assert!(!tokens.is_empty(), "nothing may follow {:?}", tokenizer.decode(&ids, true));
        let ending = |token: &&u32| {
            let bytes = tokenizer.bytes_of(**token, false);
            **token == tokenizer.end_of_text() || matches!(bytes, b"\"" | b"}" | b"]")
        };
        let endings: Vec<u32> = tokens.iter().filter(ending).copied().collect();
        let from = if ids.len() > max_tokens / 4 && !endings.is_empty() { &endings } else { &tokens };
        let token = from[rng.random_range(0..from.len())];
        constraint.accept(token).unwrap();
        ids.push(token);
    }
    Some(tokenizer.decode(&ids, true))
}

/// The JSON of a text; `None` for 1e999, which is JSON (RFC 8259, section 6), but no f64.
fn parse(text: &str) -> Option<Value> {
    match serde_json::from_str(text) {
        Ok(value) => Some(value),
        Err(error) if error.to_string().contains("number out of range") => None,
        Err(error) => panic!("{text}: {error}"),
    }
}

#[test]
fn whatever_is_drawn_fulfils_the_schema() {
    let tokenizer = tokenizer();
    let vocabulary = vocabulary(&tokenizer);
    let schemas = [
        json!({"enum": ["red", "green", 3, null, {"a": [1, "\"\\\n"]}, "海🐋"]}),
        json!({"type": "object", "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["city", "zip"], "additionalProperties": false},
            "is_new": {"type": "boolean"}},
            "required": ["name", "address"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 250}, "minItems": 2, "maxItems": 5}),
        json!({"type": "number", "minimum": -1.5, "exclusiveMaximum": 7}),
        json!({"type": "string", "maxLength": 40}),
        json!({"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "number"}}, "required": ["kind", "n"],
                "additionalProperties": false}]}),
        json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
            "value": {"type": "integer"}, "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
            "required": ["value", "left"], "additionalProperties": false}}}),
        json!({"type": "array", "prefixItems": [{"type": "string", "format": "date"}, {"type": "integer", "multipleOf": 5, "minimum": -5000, "maximum": 5000}],
            "items": false, "minItems": 2}),
        json!({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}),
    ];
    for schema in schemas {
        let grammar = Grammar::json_schema(&schema, &vocabulary).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (mut texts, mut num_complete) = (std::collections::BTreeSet::new(), 0);
        for _ in 0..40 {
            let Some(text) = draw(&mut grammar.start(), &tokenizer, &mut rng, 400) else { continue };
            num_complete += 1;
            let Some(value) = parse(&text) else { continue };
            assert!(validator.is_valid(&value), "{schema}: {text}");
            texts.insert(text);
        }
        assert!(num_complete >= 20, "{schema}: only {num_complete} of 40 texts were complete");
        assert!(texts.len() >= 5, "{schema}: {texts:?}");
    }
}

#[test]
fn any_json_is_an_object() {
    let tokenizer = tokenizer();
    let grammar = Grammar::any_json(&vocabulary(&tokenizer)).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut num_complete = 0;
    for _ in 0..30 {
        if let Some(text) = draw(&mut grammar.start(), &tokenizer, &mut rng, 600) {
            num_complete += 1;
            assert!(parse(&text).is_none_or(|value| value.is_object()), "{text}");
        }
    }
    assert!(num_complete >= 10, "{num_complete}");
}

/// A constraint that has taken a text.
fn after(grammar: &Grammar, tokenizer: &Tokenizer, text: &str) -> Result<Constraint, String> {
    let mut constraint = grammar.start();
    for token in tokenizer.encode(text).unwrap() {
        constraint.accept(token)?;
    }
    Ok(constraint)
}

#[test]
fn a_text_may_end_only_where_it_is_complete() {
    let tokenizer = tokenizer();
    let end = tokenizer.end_of_text();
    let turn = tokenizer.encode("x").unwrap()[0];
    let vocabulary = Vocabulary::new(&tokenizer, 400, &[turn, end]).unwrap();
    let grammar = Grammar::json_schema(&json!({"type": "integer"}), &vocabulary).unwrap();
    let ends = |constraint: &mut Constraint| {
        let tokens = allowed(&constraint.mask().unwrap());
        (tokens.contains(&end), tokens.contains(&turn))
    };
    assert_eq!(ends(&mut grammar.start()), (false, false));
    assert_eq!(ends(&mut after(&grammar, &tokenizer, "-").unwrap()), (false, false));
    for ending in [end, turn] {
        let mut constraint = after(&grammar, &tokenizer, "-12").unwrap();
        assert_eq!(ends(&mut constraint), (true, true));
        assert!(!constraint.is_finished());
        constraint.accept(ending).unwrap();
        assert!(constraint.is_finished());
        let error = constraint.accept(ending).unwrap_err();
        assert!(error.contains("expected no more tokens after a complete text"), "{error}");
        // Who draws once more gets an end.
        assert_eq!(allowed(&constraint.mask().unwrap()), [end.min(turn), end.max(turn)]);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_another_text_is_not_affected() {
    let tokenizer = tokenizer();
    let grammar = Grammar::json_schema(&json!({"enum": ["ab", "ac"]}), &vocabulary(&tokenizer)).unwrap();
    let mut other = after(&grammar, &tokenizer, "\"a").unwrap();
    let error = after(&grammar, &tokenizer, "\"ad").unwrap_err();
    assert!(error.contains("the grammar does not take token"), "{error}");
    assert!(!error.contains('\n'), "{error}");
    let tokens = allowed(&other.mask().unwrap());
    let texts: Vec<String> = tokens.iter().map(|&token| tokenizer.decode(&[token], false)).collect();
    assert!(
        texts.iter().all(|text| ["b", "c", "b\"", "c\""].contains(&text.as_str())) && texts.len() >= 2,
        "{texts:?}"
    );
    assert!(Vocabulary::new(&tokenizer, 400, &[400]).unwrap_err().contains("expected ending tokens below 400"));
    fn shared<T: std::fmt::Debug + Send + Sync>(_: &T) {}
    shared(&grammar);
    shared(&grammar.start());
}

#[test]
fn schemas_that_cannot_be_used_say_where() {
    let tokenizer = tokenizer();
    let vocabulary = vocabulary(&tokenizer);
    for (schema, expected) in [
        (json!(3), "an object"),
        (json!({"type": "whale"}), "at `#`: "),
        (
            json!({"type": "object", "properties": {"a/b": {"type": "array", "items": {"type": "whale"}}}}),
            "at `#/properties/a~1b/items`: ",
        ),
        (json!({"anyOf": [{"type": "null"}, {"minimum": "3", "type": "integer"}]}), "at `#/anyOf/1`: "),
        (
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"c": true}}),
            "at `#/properties/a`: ",
        ),
        (json!({"$ref": "http://127.0.0.1:1/schema.json"}), "at `#`: "),
        (json!({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}), "at `#/properties/a`: "),
        (json!({"type": "string", "pattern": "(a"}), "at `#`: "),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), "at `#`: "),
        (json!({"enum": []}), "at `#`: "),
        (json!({"type": "integer", "multipleOf": 1_234_567_891}), "a product of at most 10000; found 1234567891"),
        (
            json!({"allOf": [{"multipleOf": 0.997}, {"multipleOf": 991}]}),
            "a product of at most 10000; found 0.997, 991",
        ),
    ] {
        let error = Grammar::json_schema(&schema, &vocabulary).expect_err(&schema.to_string());
        assert!(error.contains(expected) && error.len() > expected.len() + 10, "{schema}: {error}");
    }
}

#[test]
fn hostile_schemas_cost_little() {
    let tokenizer = tokenizer();
    let vocabulary = vocabulary(&tokenizer);
    let nested =
        |depth: usize| (0..depth).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let wide =
        json!({"anyOf": (0..30).map(|i| json!({"type": "object", "required": [format!("k{i}")]})).collect::<Vec<_>>()});
    let schemas = [
        nested(20),
        nested(300),
        json!({"enum": (0..20_000).map(|i| format!("value {i}")).collect::<Vec<_>>()}),
        json!({"enum": (0..5000).map(|i| format!("value {i}")).collect::<Vec<_>>()}),
        json!({"type": "string", "pattern": "((a{1,1000}b?){1,1000}c?){1,1000}"}),
        json!({"type": "string", "pattern": "(a|b)*a(a|b){200}"}),
        json!({"type": "string", "minLength": 1_000_000, "maxLength": 1_000_000_000}),
        json!({"type": "array", "minItems": 1_000_000_000}),
        json!({"type": "array", "items": {"type": "integer"}, "maxItems": 4_000_000_000u64}),
        json!({"type": "array", "items": nested(10), "minItems": 3000, "maxItems": 100_000}),
        json!({"allOf": vec![wide.clone(); 12]}),
        json!({"$ref": "#"}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        json!({"$ref": "#/$defs/a0", "$defs": (0..2500).map(|i| (format!("a{i}"), json!({"$ref": format!("#/$defs/a{}", i + 1)})))
            .chain([("a2500".to_owned(), json!({"type": "null"}))]).collect::<serde_json::Map<_, _>>()}),
        json!({"$ref": "#/$defs/a0", "$defs": (0..1500).map(|i| (format!("a{i}"),
            json!({"items": {"$ref": format!("#/$defs/a{}", i + 1)}, "type": "array"})))
            .chain([("a1500".to_owned(), json!({"type": "null"}))]).collect::<serde_json::Map<_, _>>()}),
        json!({"type": "number", "multipleOf": 1e-300}),
        json!({"type": "integer", "multipleOf": 9_973}),
        json!({"type": "number", "multipleOf": 0.97}),
        json!({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}], "type": "integer", "minimum": 9}),
        json!({"type": "number", "minimum": -1e308, "maximum": 1e-308}),
        json!({"type": "object", "patternProperties": {"(x+x+)+y": {"type": "null"}, "a.*b": {"type": "integer"}}}),
        json!({"type": "object", "properties": (0..1500).map(|i| (format!("p{i}"), json!({"type": "string"})))
            .collect::<serde_json::Map<_, _>>()}),
        json!({"type": "object", "x-guidance": {"whitespace_pattern": "((a*)*)*"}}),
    ];
    for schema in &schemas {
        let what: String = schema.to_string().chars().take(60).collect();
        let start = kernels::clock::now_nanos();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let grammar = Grammar::json_schema(schema, &vocabulary);
        let compiled = kernels::clock::now_nanos();
        if let Ok(grammar) = &grammar {
            let mut constraint = grammar.start();
            for _ in 0..100 {
                // Too complex at some place is an answer; to go on for ever is none.
                let Ok(mask) = constraint.mask() else { break };
                let tokens = allowed(&mask);
                if constraint.is_finished() || tokens.is_empty() {
                    break;
                }
                if let Err(error) = constraint.accept(tokens[rng.random_range(0..tokens.len())]) {
                    assert!(error.contains("max is"), "{what}: {error}");
                    break;
                }
            }
        }
        let end = kernels::clock::now_nanos();
        let secs = [compiled - start, end - compiled].map(|nanos| nanos as f64 * 1e-9);
        // Ten times what the slowest takes, without optimization and on a busy machine.
        assert!(secs[0] < 10.0 && secs[1] < 10.0, "{what}: {secs:?} s");
    }
}
