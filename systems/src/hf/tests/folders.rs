//! Whole folders: what is read is what was stored, and what is written is what others read.
use super::{TINY, Tensors, changed, folder, load, random_bytes, random_tensors, save};
use crate::hf::config::{ConfigDocument, HfConfig};
use crate::hf::convert;
use crate::hf::fp8::scale_shape;
use crate::hf::read::{Finding, HfFolder, ReadError};
use crate::hf::write::{DEFAULT_SHARD_BYTES, FolderWriter, SaveDtype, WriteError, WriteOptions, write_folder};
use crate::params::{ParamKind, param_specs};
use kernels::fp8::decode_e4m3;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const EMBED_COPY: &str = "model.layers.2.embed_tokens.weight";
const HEAD_COPY: &str = "model.layers.2.shared_head.head.weight";

/// All tensors of a folder, by the safetensors library, and the file of each.
fn load_all(dir: &Path) -> (Tensors, BTreeMap<String, String>) {
    let mut tensors = Tensors::new();
    let mut files = BTreeMap::new();
    for item in fs::read_dir(dir).unwrap() {
        let name = item.unwrap().file_name().to_string_lossy().to_string();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            for (tensor, stored) in load(&dir.join(&name)) {
                files.insert(tensor.clone(), name.clone());
                assert!(tensors.insert(tensor.clone(), stored).is_none(), "{tensor} is in two files");
            }
        }
    }
    (tensors, files)
}

/// A released folder: MTP module with its copies of embedding and head.
fn released(dtype: Dtype) -> Tensors {
    let mut tensors = random_tensors(TINY, dtype);
    tensors.insert(EMBED_COPY.into(), tensors[EMBED].clone());
    tensors.insert(HEAD_COPY.into(), tensors[HEAD].clone());
    tensors
}

fn findings(folder: &HfFolder) -> Vec<String> {
    match folder.model().unwrap_err() {
        ReadError::Weights { findings, .. } => findings.iter().map(Finding::to_string).collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_conversion_without_change_keeps_every_byte() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let mut tensors = released(dtype);
        // Files mix types: one matrix in another.
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        tensors.insert("lm_head.weight".into(), (Dtype::F16, vec![11, 7], random_bytes(Dtype::F16, 77, &mut rng)));
        tensors.insert(HEAD_COPY.into(), tensors[HEAD].clone());
        let source = folder(TINY, &tensors);
        let files = [("generation_config.json", "{ }"), ("tokenizer.json", "{\"a\" :1}"), ("configuration_x.py", "#")];
        for (name, text) in files {
            fs::write(source.path().join(name), text).unwrap();
        }
        let destination = tempfile::tempdir().unwrap();
        let shard_bytes = 1000;
        let (written, notes) = convert(source.path(), destination.path(), None, shard_bytes).unwrap();
        let (found, places) = load_all(destination.path());
        assert_eq!(found, tensors, "{dtype:?}");
        assert!(written.files.len() > 2 && notes.is_empty(), "{written:?} {notes:?}");
        assert_eq!((written.num_tensors, written.num_bytes), (found.len(), total_bytes(&found)));
        check_shards(destination.path(), &found, &places, shard_bytes);
        for (name, text) in files.into_iter().chain([("config.json", TINY)]) {
            assert_eq!(fs::read_to_string(destination.path().join(name)).unwrap(), text, "{name}");
        }
        // And back into one file.
        let again = tempfile::tempdir().unwrap();
        let (written, _) = convert(destination.path(), again.path(), None, DEFAULT_SHARD_BYTES).unwrap();
        assert_eq!(written.files, ["model.safetensors"]);
        assert!(!again.path().join("model.safetensors.index.json").exists());
        assert_eq!(load_all(again.path()).0, tensors);
    }
}

fn total_bytes(tensors: &Tensors) -> u64 {
    tensors.values().map(|(_, _, bytes)| bytes.len() as u64).sum()
}

/// Names, sizes, index and header of shards.
fn check_shards(dir: &Path, tensors: &Tensors, places: &BTreeMap<String, String>, limit: u64) {
    let index: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], total_bytes(tensors));
    assert_eq!(index["weight_map"], json!(places));
    let mut sizes: BTreeMap<&String, u64> = BTreeMap::new();
    for (name, file) in places {
        *sizes.entry(file).or_default() += tensors[name].2.len() as u64;
    }
    for (i, (file, size)) in sizes.iter().enumerate() {
        assert_eq!(**file, format!("model-{:05}-of-{:05}.safetensors", i + 1, sizes.len()));
        assert!(*size <= limit, "{file} holds {size} bytes");
        let bytes = fs::read(dir.join(file)).unwrap();
        let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert_eq!(header_len % 8, 0, "data is aligned");
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).unwrap();
            assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name} is aligned");
        }
    }
}

#[test]
fn a_change_of_type_rounds_to_nearest_and_spares_correction_biases() {
    let tensors: Tensors = released(Dtype::F16);
    let source = folder(TINY, &tensors);
    let destination = tempfile::tempdir().unwrap();
    convert(source.path(), destination.path(), Some(SaveDtype::Bf16), DEFAULT_SHARD_BYTES).unwrap();
    let (found, _) = load_all(destination.path());
    assert_eq!(found.len(), tensors.len());
    for (name, (dtype, shape, bytes)) in &found {
        let (_, source_shape, source) = &tensors[name];
        assert_eq!(shape, source_shape);
        if name.ends_with("e_score_correction_bias") {
            assert_eq!((dtype, bytes), (&Dtype::F32, source), "{name}");
            continue;
        }
        assert_eq!(*dtype, Dtype::BF16, "{name}");
        for (source, found) in source.as_chunks().0.iter().zip(bytes.as_chunks().0) {
            let exact = f64::from(half::f16::from_le_bytes(*source));
            let found = u16::from_le_bytes(*found);
            let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
            let error = (value(found) - exact).abs();
            for other in [found.wrapping_sub(1), found + 1].map(value).into_iter().filter(|v| v.is_finite()) {
                assert!(error <= (other - exact).abs(), "{name}: {exact} became {}", value(found));
            }
        }
    }
    let config: Value =
        serde_json::from_str(&fs::read_to_string(destination.path().join("config.json")).unwrap()).unwrap();
    let expected: Value = serde_json::from_str(TINY).unwrap();
    assert_eq!(config, expected, "it was called bfloat16 already");
}

#[test]
fn fp8_weights_are_read_with_their_factors_and_written_in_bf16() {
    let block = [2, 4];
    let quantization = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block});
    let config = changed(TINY, &json!({"quantization_config": quantization}));
    let mut tensors = released(Dtype::BF16);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let is_fp8 = |name: &str| name.contains("_proj.weight") && !name.contains("eh_proj");
    let mut expected: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let names: Vec<String> = tensors.keys().filter(|name| is_fp8(name)).cloned().collect();
    for name in names {
        let shape = tensors[&name].1.clone();
        let codes = random_bytes(Dtype::F8_E4M3, shape[0] * shape[1], &mut rng);
        let scale_shape = scale_shape([shape[0], shape[1]], block).to_vec();
        let scales: Vec<f32> = (0..scale_shape[0] * scale_shape[1]).map(|i| 0.001 * (i + 1) as f32).collect();
        let value = |i: usize| {
            let (row, column) = (i / shape[1], i % shape[1]);
            decode_e4m3(codes[i]) * scales[row / block[0] * scale_shape[1] + column / block[1]]
        };
        expected.insert(name.clone(), (0..codes.len()).map(value).collect());
        let scale_bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, scale_shape, scale_bytes));
        tensors.insert(name, (Dtype::F8_E4M3, shape, codes));
    }
    assert!(expected.len() > 30, "{}", expected.len());
    let source = folder(&config, &tensors);

    let opened = HfFolder::open(source.path()).unwrap();
    for spec in opened.model().unwrap().specs {
        let values = opened.read_param(&spec).unwrap();
        for view in spec.views.iter().filter(|view| is_fp8(&view.hf_name)) {
            assert_eq!(values[view.offset..][..view.num_elements()], expected[&view.hf_name], "{}", view.hf_name);
        }
    }

    let destination = tempfile::tempdir().unwrap();
    convert(source.path(), destination.path(), None, DEFAULT_SHARD_BYTES).unwrap();
    let (found, _) = load_all(destination.path());
    for (name, stored) in &found {
        let Some(values) = expected.get(name) else {
            assert_eq!(*stored, tensors[name], "{name} was not quantized");
            continue;
        };
        let bf16: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(*stored, (Dtype::BF16, tensors[name].1.clone(), bf16), "{name}");
    }
    let written = HfFolder::open(destination.path()).unwrap();
    assert_eq!(written.config().config().quantization_config, None);
    assert!(!written.tensor_names().any(|name| name.ends_with("_scale_inv")));

    // A factor that is missing, or of another shape.
    let first = expected.keys().next().unwrap();
    let scale = format!("{first}_scale_inv");
    let stored = tensors.remove(&scale).unwrap();
    save(&source.path().join("model.safetensors"), &tensors);
    assert_eq!(findings(&HfFolder::open(source.path()).unwrap()), [format!("missing: {scale} {:?}", stored.1)]);
}

#[test]
fn weights_are_written_in_fp8_and_come_back() {
    let tensors = released(Dtype::BF16);
    let source = folder(TINY, &tensors);
    let [first, second] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    convert(source.path(), first.path(), Some(SaveDtype::Fp8), DEFAULT_SHARD_BYTES).unwrap();
    let (found, _) = load_all(first.path());
    let is_fp8 = |name: &str| name.contains("_proj") && name.ends_with(".weight") && !name.contains("eh_proj");
    for (name, (_, shape, _)) in &tensors {
        let (dtype, found_shape, _) = &found[name];
        let want = match name {
            name if is_fp8(name) => Dtype::F8_E4M3,
            name if name.ends_with("e_score_correction_bias") => Dtype::F32,
            _ => Dtype::BF16,
        };
        assert_eq!((dtype, found_shape), (&want, shape), "{name}");
        let scales = found.get(&format!("{name}_scale_inv"));
        assert_eq!(scales.map(|(dtype, ..)| *dtype), is_fp8(name).then_some(Dtype::F32), "{name}");
    }
    let (before, after) = (HfFolder::open(source.path()).unwrap(), HfFolder::open(first.path()).unwrap());
    assert!(after.is_quantized());
    after.model().unwrap();
    for spec in before.model().unwrap().specs {
        let (want, got) = (before.read_param(&spec).unwrap(), after.read_param(&spec).unwrap());
        let most = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= (want.abs() / 16.0).max(most / 448.0 / 512.0), "{}", spec.name);
        }
    }
    // What was in 8 bits stays as it was.
    convert(first.path(), second.path(), Some(SaveDtype::Fp8), DEFAULT_SHARD_BYTES).unwrap();
    for (name, (_, _, codes)) in load_all(second.path()).0 {
        assert!(name.ends_with("_scale_inv") || codes == found[&name].2, "{name}");
    }
}

#[test]
fn everything_missing_different_or_left_over_is_named() {
    let mut tensors = released(Dtype::BF16);
    tensors.remove("model.layers.1.mlp.experts.3.up_proj.weight");
    tensors.remove("model.norm.weight");
    tensors.insert("model.layers.0.mlp.down_proj.weight".into(), (Dtype::BF16, vec![5, 7], vec![0; 70]));
    tensors.insert("model.layers.0.input_layernorm.weight".into(), (Dtype::I64, vec![7], vec![0; 56]));
    tensors.insert("model.layers.0.mlp.down_proj.bias".into(), (Dtype::BF16, vec![7], vec![0; 14]));
    tensors.insert("model.layers.3.enorm.weight".into(), (Dtype::BF16, vec![7], vec![0; 14]));
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![1], vec![0; 4]));
    let dir = folder(TINY, &tensors);
    let expected = [
        "wrong type: model.layers.0.input_layernorm.weight: expected F32, BF16, F16 or F8_E4M3, found I64",
        "wrong shape: model.layers.0.mlp.down_proj.weight: expected [7, 5], found [5, 7]",
        "missing: model.layers.1.mlp.experts.3.up_proj.weight [3, 7]",
        "missing: model.norm.weight [7]",
        "not used: model.layers.0.mlp.down_proj.bias",
        "not used: model.layers.3.enorm.weight (an MTP module? Then config.json needs num_nextn_predict_layers = 2)",
    ];
    assert_eq!(findings(&HfFolder::open(dir.path()).unwrap()), expected);
    let message = HfFolder::open(dir.path()).unwrap().model().unwrap_err().to_string();
    assert!(expected.iter().all(|line| message.contains(line)), "{message}");
}

#[test]
fn an_mtp_module_without_weights_is_left_out_with_a_note() {
    let mut tensors = random_tensors(TINY, Dtype::BF16);
    tensors.retain(|name, _| !name.starts_with("model.layers.2."));
    let dir = folder(TINY, &tensors);
    let model = HfFolder::open(dir.path()).unwrap().model().unwrap();
    assert_eq!(model.config.num_nextn_predict_layers, 0);
    assert!(model.notes[0].contains("read without MTP"), "{:?}", model.notes);
    // But half a module is a damaged folder.
    tensors.insert("model.layers.2.enorm.weight".into(), (Dtype::BF16, vec![7], vec![0; 14]));
    let dir = folder(TINY, &tensors);
    assert!(findings(&HfFolder::open(dir.path()).unwrap()).len() > 10);
}

#[test]
fn copies_may_be_absent_but_must_be_equal() {
    let tied = changed(TINY, &json!({"tie_word_embeddings": true}));
    let cases = [(TINY, EMBED, EMBED_COPY), (TINY, HEAD, HEAD_COPY), (&tied, EMBED, HEAD), (&tied, EMBED, HEAD_COPY)];
    for (config, name, copy) in cases {
        let mut tensors = random_tensors(config, Dtype::BF16);
        tensors.insert(copy.into(), tensors[name].clone());
        let destination = tempfile::tempdir().unwrap();
        convert(folder(config, &tensors).path(), destination.path(), None, 500).unwrap();
        assert_eq!(load_all(destination.path()).0, tensors, "{copy} is kept, and no other copy is made");

        tensors.get_mut(copy).unwrap().2[2 * 17] ^= 1;
        let dir = folder(config, &tensors);
        let opened = HfFolder::open(dir.path()).unwrap();
        let specs = opened.model().unwrap().specs;
        let spec = specs.iter().find(|spec| spec.name == name).unwrap();
        match opened.read_param(spec).unwrap_err() {
            ReadError::AliasDiffers { alias, name: of, index, .. } => {
                assert_eq!((&*alias, &*of, index), (copy, name, 17))
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn one_view_is_read_without_the_others() {
    let tensors = released(Dtype::F32);
    let dir = folder(TINY, &tensors);
    let opened = HfFolder::open(dir.path()).unwrap();
    let specs = opened.model().unwrap().specs;
    let experts = specs.iter().find(|spec| spec.kind == ParamKind::ExpertLinear).unwrap();
    let packed = opened.read_param(experts).unwrap();
    for view in &experts.views {
        let mut values = vec![0.0; view.num_elements()];
        opened.read_view(view, &mut values).unwrap();
        assert_eq!(values, packed[view.offset..][..values.len()]);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(bytes, tensors[&view.hf_name].2);
    }
}

#[test]
fn a_new_model_is_written_as_on_the_hub_and_read_back() {
    let model = ConfigDocument::parse(TINY).unwrap().config().resolve().unwrap();
    let specs = param_specs(&model);
    let keys =
        HfConfig { eos_token_id: serde_json::from_value(json!([1, 2])).unwrap(), ..HfConfig::from_model(&model) };
    let config = ConfigDocument::from_config(keys).unwrap().storing(Some("float32")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("step-0000100");
    let value = |name: &str, i: usize| (name.len() * 1000 + i) as f32 * 0.37;
    let source = |spec: &crate::params::ParamSpec| {
        Ok::<_, WriteError>((0..spec.num_elements()).map(|i| value(&spec.name, i)).collect())
    };
    write_folder(&dir, &config, &specs, &WriteOptions::hub(&specs, SaveDtype::F32), source).unwrap();

    let folder = HfFolder::open(&dir).unwrap();
    let read = folder.model().unwrap();
    assert_eq!((&read.config, &read.specs, read.notes.len()), (&model, &specs, 0));
    for spec in &specs {
        let values = folder.read_param(spec).unwrap();
        assert!(values.iter().enumerate().all(|(i, v)| *v == value(&spec.name, i)), "{}", spec.name);
    }
    let names: Vec<&str> = folder.tensor_names().collect();
    assert!(names.contains(&EMBED_COPY) && names.contains(&HEAD_COPY), "{names:?}");
    let generation: Value = serde_json::from_str(folder.generation_config().unwrap()).unwrap();
    assert_eq!(generation, json!({"_from_model_config": true, "eos_token_id": [1, 2]}));
    let document: Value = serde_json::from_str(folder.config().text()).unwrap();
    assert_eq!(document["architectures"], json!(["DeepseekV3ForCausalLM"]));
    assert_eq!(document["torch_dtype"], "float32");
    assert_eq!(document["q_lora_rank"], Value::Null);
}

#[test]
fn a_writer_refuses_what_would_not_be_a_checkpoint() {
    let model = ConfigDocument::parse(TINY).unwrap();
    let specs = param_specs(&model.config().resolve().unwrap());
    let options = WriteOptions::hub(&specs, SaveDtype::F16);
    let dir = tempfile::tempdir().unwrap();
    let mut writer = FolderWriter::create(dir.path(), &specs, &options).unwrap();
    let embed = &specs[0];
    assert!(matches!(writer.write_param(embed, &[0.0]), Err(WriteError::Length { expected: 77, found: 1, .. })));
    let mut values = vec![1.0; 77];
    values[7] = 70000.0; // above the largest half
    let error = writer.write_param(embed, &values).unwrap_err();
    assert!(matches!(error, WriteError::NotFinite { index: 7, value: 70000.0, .. }), "{error}");
    let mut stranger = embed.views[0].clone();
    stranger.hf_name = "model.stranger".into();
    assert!(matches!(writer.write_view(&stranger, &values), Err(WriteError::Unknown { .. })));
    values[7] = 1.0;
    writer.write_param(embed, &values).unwrap();
    let num_written = 2; // with the copy in the MTP module
    let num_tensors: usize = specs.iter().map(|spec| spec.views.len() + spec.aliases.len()).sum();
    match writer.finish(&model).unwrap_err() {
        WriteError::Incomplete { num_missing, .. } => assert_eq!(num_missing, num_tensors - num_written),
        other => panic!("{other}"),
    }
    assert!(!dir.path().join("config.json").exists());
    assert!(matches!(FolderWriter::create(dir.path(), &specs, &options), Err(WriteError::Occupied { .. })));
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert!(FolderWriter::create(dir.path(), &specs, &options).is_ok());
}

/// Folders that transformers 5 wrote.
fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracle/fixtures");
    let items = fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let folders: Vec<PathBuf> = items.map(|item| item.unwrap().path()).filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 6, "{folders:?}");
    folders
}

#[test]
fn folders_of_transformers_are_read_and_written_back_unchanged() {
    for source in fixtures() {
        let opened = HfFolder::open(&source).unwrap();
        let model = opened.model().unwrap();
        assert_eq!(model.notes, [""; 0], "{}", source.display());
        let hub = ConfigDocument::parse(&fs::read_to_string(source.join("config_hub.json")).unwrap()).unwrap();
        assert_eq!(model.config, hub.config().resolve().unwrap(), "rope_parameters and rope_scaling agree");
        assert_eq!(HfConfig::from_model(&model.config).resolve().unwrap(), model.config);

        let destination = tempfile::tempdir().unwrap();
        convert(&source, destination.path(), None, 30_000).unwrap();
        let (tensors, _) = load_all(destination.path());
        assert_eq!(tensors, load(&source.join("model.safetensors")), "{}", source.display());
        for name in ["config.json", "generation_config.json"] {
            let text = |dir: &Path| fs::read_to_string(dir.join(name)).unwrap();
            assert_eq!(text(destination.path()), text(&source), "{name}");
        }
    }
}
