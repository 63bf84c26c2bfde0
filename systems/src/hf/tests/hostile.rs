//! Files that are damaged, or made to do damage: each is an error that names the file and what is wrong with it.
use super::{TINY, changed, folder, random_tensors, save};
use crate::hf::read::{HfFolder, ReadError};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::fs;
use std::path::Path;

/// Opens a folder whose only weight file has these bytes.
fn open_bytes(bytes: &[u8]) -> Result<HfFolder, ReadError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), TINY).unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    HfFolder::open(dir.path())
}

fn file(header: &str, num_data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + num_data_bytes, 0);
    bytes
}

#[test]
fn headers_are_checked_before_they_are_believed() {
    let tensor = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = |dtype, shape, from, to| format!("{{{}}}", tensor("a", dtype, shape, from, to));
    let two = |from, to| format!("{{{},{}}}", tensor("a", "F32", "[2]", 0, 8), tensor("b", "F32", "[1]", from, to));
    let huge = u64::MAX.to_le_bytes().to_vec();
    let long = [&200_000_000_u64.to_le_bytes()[..], &[b'{'; 64]].concat();
    let cases = [
        ("no bytes", vec![], "only 0 bytes"),
        ("no header", vec![1, 0, 0], "only 3 bytes"),
        ("a length beyond all memory", huge, "18446744073709551615 bytes, but can have 0"),
        ("a length beyond the file", long, "200000000 bytes, but can have 64"),
        ("not JSON", file("hello", 0), "header is invalid"),
        ("not UTF-8", file("{\"\u{e9}\":1}", 0), "header is invalid"),
        ("offsets past the end", file(&one("F32", "[2]", 0, 8), 4), "describes 8 bytes of tensors, the file holds 4"),
        ("bytes of no tensor", file(&one("F32", "[2]", 0, 8), 12), "describes 8 bytes of tensors, the file holds 12"),
        ("a shape of another size", file(&one("F32", "[3]", 0, 8), 8), "header is invalid"),
        ("offsets backwards", file(&one("F32", "[2]", 8, 0), 8), "header is invalid"),
        ("a shape that overflows", file(&one("F32", "[4294967296,4294967296,4]", 0, 8), 8), "header is invalid"),
        ("a negative shape", file(&one("F32", "[-2]", 0, 8), 8), "header is invalid"),
        ("an unknown type", file(&one("F3", "[2]", 0, 8), 8), "header is invalid"),
        ("tensors that overlap", file(&two(4, 8), 8), "header is invalid"),
        ("a gap between tensors", file(&two(12, 16), 16), "header is invalid"),
        ("an offset beyond 64 bits", file(&two(8, u64::MAX), 16), "header is invalid"),
    ];
    for (what, bytes, message) in cases {
        let error = open_bytes(&bytes).expect_err(what);
        assert!(matches!(error, ReadError::File { .. }), "{what}: {error}");
        let text = error.to_string();
        assert!(text.contains(message) && text.contains("model.safetensors"), "{what}: {text}");
    }
    assert!(open_bytes(&file(&two(8, 12), 12)).is_ok(), "the harness makes good files, too");
}

#[test]
fn an_index_must_agree_with_its_files_and_stay_in_its_folder() {
    let tensors = random_tensors(TINY, Dtype::BF16);
    let (first, others) = (tensors.iter().take(1), tensors.iter().skip(1));
    let owned = |(name, stored): (&String, &super::Stored)| (name.clone(), stored.clone());
    let shards: [super::Tensors; 2] = [first.map(owned).collect(), others.map(owned).collect()];
    let names = ["a.safetensors", "b.safetensors"];
    let good = |name: &String| if shards[0].contains_key(name) { names[0] } else { names[1] };
    let norm = "model.norm.weight";
    let open = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>), setup: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), TINY).unwrap();
        for (name, shard) in names.iter().zip(&shards) {
            save(&dir.path().join(name), shard);
        }
        let mut map = tensors.keys().map(|name| (name.clone(), json!(good(name)))).collect();
        edit(&mut map);
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        setup(dir.path());
        HfFolder::open(dir.path()).map(|folder| folder.model().map(|_| ()))
    };
    assert!(open(&|_| {}, &|_| {}).unwrap().is_ok());

    let set = |file: &'static str| {
        move |map: &mut serde_json::Map<String, serde_json::Value>| {
            map.insert(norm.into(), file.into());
        }
    };
    let error = |result: Result<_, ReadError>| result.expect_err("an error").to_string();
    let text = error(open(&set("../b.safetensors"), &|_| {}));
    assert!(text.contains("expected the name of a safetensors file") && text.contains("../b"), "{text}");
    let text = error(open(&set("/etc/passwd"), &|_| {}));
    assert!(text.contains("/etc/passwd"), "{text}");
    let text = error(open(&set("c.safetensors"), &|_| {}));
    assert!(text.contains("cannot read") && text.contains("c.safetensors"), "{text}");
    let text = error(open(&set("a.safetensors"), &|_| {}));
    assert!(text.contains("should be in a.safetensors, but is in b.safetensors"), "{text}");
    let text = error(open(&|map| _ = map.insert("ghost".into(), names[0].into()), &|_| {}));
    assert!(text.contains("ghost should be in a.safetensors, but is in no file"), "{text}");
    let text = error(open(&|map| _ = map.remove(norm), &|_| {}));
    assert!(text.contains("does not list model.norm.weight, which b.safetensors holds"), "{text}");
    let text = error(open(&|_| {}, &|dir| _ = fs::copy(dir.join(names[0]), dir.join(names[1])).unwrap()));
    assert!(text.contains("so does"), "{text}");
    let text = error(open(&|_| {}, &|dir| _ = fs::copy(dir.join(names[0]), dir.join("model.safetensors")).unwrap()));
    assert!(text.contains("remove one"), "{text}");
    let text = error(open(&|_| {}, &|dir| fs::write(dir.join("model.safetensors.index.json"), "{}").unwrap()));
    assert!(text.contains("weight_map"), "{text}");
}

#[test]
fn a_folder_without_parts_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let open = || HfFolder::open(dir.path()).unwrap_err().to_string();
    assert!(open().contains("config.json"));
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(open().contains("JSON object"));
    fs::write(dir.path().join("config.json"), TINY).unwrap();
    assert!(open().contains("neither model.safetensors nor model.safetensors.index.json"));
}

#[test]
fn problems_of_the_config_come_with_the_file() {
    let config = changed(TINY, &json!({"n_group": 3, "hidden_act": "gelu"}));
    let dir = folder(&config, &super::Tensors::new());
    let text = HfFolder::open(dir.path()).unwrap().model().unwrap_err().to_string();
    for part in ["config.json", "n_group: 3 does not divide", "the nearest are 2 and 4", "hidden_act"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn experts_in_one_tensor_are_refused_with_a_way_out() {
    let mut tensors = random_tensors(TINY, Dtype::BF16);
    let name = "model.layers.1.mlp.experts.gate_up_proj";
    tensors.insert(name.into(), (Dtype::BF16, vec![4, 6, 7], vec![0; 336]));
    let dir = folder(TINY, &tensors);
    let text = HfFolder::open(dir.path()).unwrap().model().unwrap_err().to_string();
    assert!(text.contains(name) && text.contains("save_pretrained"), "{text}");
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let bf16 = half::bf16::NAN.to_le_bytes();
    let f32 = f32::NEG_INFINITY.to_le_bytes();
    for (name, at, bytes) in [
        ("model.layers.1.mlp.experts.2.down_proj.weight", 5, &bf16[..]),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 3, &f32[..]),
    ] {
        let mut tensors = random_tensors(TINY, Dtype::BF16);
        tensors.get_mut(name).unwrap().2[at * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        let dir = folder(TINY, &tensors);
        let opened = HfFolder::open(dir.path()).unwrap();
        let errors =
            opened.model().unwrap().specs.iter().filter_map(|spec| opened.read_param(spec).err()).collect::<Vec<_>>();
        match &errors[..] {
            [ReadError::NotFinite { name: found, index, .. }] => assert_eq!((found.as_str(), *index), (name, at)),
            other => panic!("{other:?}"),
        }
    }
}
