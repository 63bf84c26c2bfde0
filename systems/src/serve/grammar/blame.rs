//! Where in a schema the trouble is. The compiler says what, and seldom where; so parts of a schema that cannot be compiled are compiled
//! alone, down to the smallest that cannot.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH};

/// Time for it: a search is a courtesy.
const MAX_SEARCH_NANOS: u64 = 200_000_000;

/// Keywords whose value is a schema, a list of them, or named ones.
const PARTS: [&str; 9] = [
    "items",
    "additionalProperties",
    "anyOf",
    "allOf",
    "oneOf",
    "prefixItems",
    "properties",
    "patternProperties",
    "$defs",
];

/// Keywords under which schemas are that others refer to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// The product of the different values of `multipleOf` in a schema, each without its point, times the power of 10 that moves all points:
/// the compiler has a state for each remainder of their least common multiple.
const MAX_MULTIPLE: f64 = 1e4;

/// Refuses a schema beyond the limits, before anything goes into its depth.
pub(super) fn check_limits(schema: &Value) -> Result<(), String> {
    let mut stack = vec![(schema, 0)];
    let mut num_bytes = 0usize;
    let mut multiples = BTreeSet::new();
    while let Some((value, depth)) = stack.pop() {
        if depth > MAX_SCHEMA_DEPTH {
            return Err(format!(
                "expected a JSON schema at most {MAX_SCHEMA_DEPTH} values deep, found a deeper one; use $ref"
            ));
        }
        num_bytes += 8 + match value {
            Value::String(text) => text.len(),
            Value::Object(map) => map.keys().map(|key| key.len() + 4).sum(),
            _ => 0,
        };
        if num_bytes > MAX_SCHEMA_BYTES {
            return Err(format!("expected a JSON schema of at most {MAX_SCHEMA_BYTES} bytes, found a larger one"));
        }
        if let Some(multiple) = value.get("multipleOf").and_then(Value::as_f64) {
            multiples.insert(multiple.to_string());
        }
        match value {
            Value::Array(list) => stack.extend(list.iter().map(|value| (value, depth + 1))),
            Value::Object(map) => stack.extend(map.values().map(|value| (value, depth + 1))),
            _ => {}
        }
    }
    let digits = |text: &String| text.replace('.', "").parse::<f64>().unwrap_or(f64::INFINITY).abs().max(1.0);
    let places =
        multiples.iter().filter_map(|text| text.split_once('.')).map(|(_, after)| after.len()).max().unwrap_or(0);
    let product = multiples.iter().map(digits).product::<f64>() * 10f64.powf(places as f64);
    if product > MAX_MULTIPLE {
        let found: Vec<String> = multiples.into_iter().map(|text| text.chars().take(20).collect()).collect();
        let expected = format!("expected values of `multipleOf` whose digits have a product of at most {MAX_MULTIPLE}");
        return Err(format!("{expected}; found {}", found.join(", ")));
    }
    Ok(())
}

/// JSON pointer to the smallest part that has a fault by itself, and its fault; `fault` is the whole's.
pub(super) fn find(schema: &Value, fault: String, compile: impl Fn(&Value) -> Option<String>) -> (String, String) {
    let start = kernels::clock::now_nanos();
    let (mut place, mut fault, mut part) = ("#".to_owned(), fault, schema);
    let definitions: Map<String, Value> =
        DEFINITIONS.iter().filter_map(|&name| Some((name.to_owned(), schema.get(name)?.clone()))).collect();
    'smaller: loop {
        for (pointer, inner) in parts(part) {
            if kernels::clock::now_nanos() - start > MAX_SEARCH_NANOS {
                break 'smaller;
            }
            let alone = match inner {
                Value::Object(keys) => {
                    let mut alone = keys.clone();
                    for (name, value) in &definitions {
                        alone.entry(name).or_insert_with(|| value.clone());
                    }
                    Value::Object(alone)
                }
                other => other.clone(),
            };
            // `true` and `false` are schemas, and nothing is wrong with them alone.
            if inner.is_boolean() {
                continue;
            }
            if let Some(found) = compile(&alone) {
                place += &pointer;
                (fault, part) = (found, inner);
                continue 'smaller;
            }
        }
        break;
    }
    (place, fault)
}

/// The schemas in a schema, with the way to each.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    for name in PARTS {
        match (name, schema.get(name)) {
            ("properties" | "patternProperties" | "$defs", Some(Value::Object(map))) => {
                found.extend(map.iter().map(|(key, part)| (format!("/{name}/{}", escape(key)), part)));
            }
            ("anyOf" | "allOf" | "oneOf" | "prefixItems", Some(Value::Array(list))) => {
                found.extend(list.iter().enumerate().map(|(i, part)| (format!("/{name}/{i}"), part)));
            }
            ("items" | "additionalProperties", Some(part)) => found.push((format!("/{name}"), part)),
            _ => {}
        }
    }
    found
}

/// As JSON pointers write a key (RFC 6901, section 3).
fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
