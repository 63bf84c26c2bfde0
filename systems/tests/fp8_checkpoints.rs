//! Checkpoints in FP8: what products multiply are the file's codes and factors, whatever this program would have made of the weights.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use engine::prelude::*;
use kernels::{
    device::Device,
    dtype::DType,
    fp8::{Blocks, TILE, Tiles, decode_e4m3},
    memory::Memory,
    ops::{fp8_gemm, fp8_grouped_gemm, quantize},
    stream::{Hazards, Stream},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use systems::{
    api::{Progress, StepReport},
    data::packing::Batch,
    evaluate::EvaluationResult,
    formats::Formats,
    hf::{
        config::ConfigDocument,
        convert,
        read::{HfFolder, ReadError},
        write::{DEFAULT_SHARD_BYTES, SaveDtype, WriteOptions, write_folder},
    },
    local::Silent,
    model::{Model, Parameters, Weight, initial_values},
    params::{ParamSpec, param_specs, param_specs_where},
    probe::{Checkpoint, Probe},
    scene::Compute,
    weights::{Weights, WeightsReport, fill},
};

/// Stored tensors by name: type, shape, bytes.
type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A small DeepSeek-V3 whose matrices have several blocks, some of them partial, and whose packed ones end with a block.
const CONFIG: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 160, "intermediate_size": 256, "moe_intermediate_size": 128,
  "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 136, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
  "qk_rope_head_dim": 16, "v_head_dim": 72, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
  "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "max_position_embeddings": 64
}"#;

/// What is stored in place of what this program wrote.
#[derive(Clone, Copy)]
enum Codes {
    /// As written: each block's largest number is 448.
    Written,
    /// Powers of two as factors, and each block has a 448: rounding these numbers again gives the same.
    Reproducible,
    /// Powers of two as factors, and no block has a number above 240: rounding them again gives others.
    Foreign,
}

fn load(path: &Path) -> Stored {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.tensors().into_iter().map(|(name, view)| (name, stored(view))).collect()
}

fn save(path: &Path, tensors: &Stored) {
    let view = |(dtype, shape, bytes)| TensorView::new(dtype, shape, bytes).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| (name, view((*dtype, shape.clone(), bytes))));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A folder in FP8.
fn folder(config: &str, codes: Codes) -> tempfile::TempDir {
    let document = ConfigDocument::parse(config).unwrap();
    let model = document.config().resolve().unwrap();
    let specs = param_specs(&model);
    let dir = tempfile::tempdir().unwrap();
    let options = WriteOptions::hub(&specs, SaveDtype::Fp8);
    let values = |spec: &ParamSpec| Ok::<_, ReadError>(initial_values(spec, &model, 5));
    write_folder(dir.path(), &document.quantized().unwrap(), &specs, &options, values).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut tensors = load(&path);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let names: Vec<String> = tensors.iter().filter(|(_, t)| t.0 == Dtype::F8_E4M3).map(|(n, _)| n.clone()).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let most = match codes {
            Codes::Written => continue,
            Codes::Reproducible => 0x7e,
            Codes::Foreign => 0x77,
        };
        let (_, shape, bytes) = tensors.get_mut(&name).unwrap();
        let columns = shape[1];
        for (at, code) in bytes.iter_mut().enumerate() {
            let is_first = (at / columns).is_multiple_of(TILE) && (at % columns).is_multiple_of(TILE);
            let magnitude = if is_first { most } else { (rng.next_u32() % (u32::from(most) + 1)) as u8 };
            *code = magnitude | if rng.next_u32().is_multiple_of(2) { 0x80 } else { 0 };
        }
        let (_, _, scales) = tensors.get_mut(&format!("{name}_scale_inv")).unwrap();
        for scale in scales.as_chunks_mut::<4>().0 {
            *scale = 2f32.powi(-13 - (rng.next_u32() % 3) as i32).to_le_bytes();
        }
    }
    save(&path, &tensors);
    dir
}

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Progress for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn step(&self, _: &StepReport) {}
    fn evaluated(&self, _: &EvaluationResult) {}
    fn text(&self, _: &str) {}
}

fn open(path: &Path, trainable: bool) -> Checkpoint {
    let silent: Arc<dyn Progress> = Arc::new(Silent);
    Checkpoint::load(path, (Compute::Fp8, Device::Cpu), 64, trainable, &silent).unwrap()
}

/// The bytes of a parameter's codes and factors in a file.
fn bytes_of(tensors: &Stored, spec: &ParamSpec) -> (Vec<u8>, Vec<u8>) {
    let all = |suffix: &str| {
        let names = spec.views.iter().map(|view| format!("{}{suffix}", view.hf_name));
        names.flat_map(|name| tensors[&name].2.clone()).collect()
    };
    (all(""), all("_scale_inv"))
}

fn bytes_in(memory: &Memory, blocks: Blocks) -> (Vec<u8>, Vec<u8>) {
    let scales = memory.download::<f32>(blocks.scales);
    (memory.download::<u8>(blocks.codes), scales.iter().flat_map(|scale| scale.to_le_bytes()).collect())
}

fn in_8_bits(app: &App) -> Vec<(ParamSpec, Weight)> {
    let parameters = app.world().resource::<Parameters>();
    parameters.iter().filter(|(_, w)| w.fp8.is_some()).map(|(spec, w)| (spec.clone(), w)).collect()
}

#[test]
fn codes_and_factors_in_memory_are_those_of_the_file() {
    for codes in [Codes::Written, Codes::Reproducible, Codes::Foreign] {
        let dir = folder(CONFIG, codes);
        let tensors = load(&dir.path().join("model.safetensors"));
        for trainable in [false, true] {
            let checkpoint = open(dir.path(), trainable);
            let memory = checkpoint.app.world().resource::<Tensors>().memory().clone();
            let weights = in_8_bits(&checkpoint.app);
            let report = checkpoint.weights();
            assert_eq!((report.num_fp8_as_stored, report.num_fp8_rounded), (weights.len(), 0), "{report:?}");
            assert_eq!(weights.len(), 5 + 2 + 5 + 4);
            for (spec, weight) in weights {
                let fp8 = weight.fp8.unwrap();
                let file = bytes_of(&tensors, &spec);
                assert!(bytes_in(&memory, fp8.blocks) == file, "{}", spec.name);
                assert_eq!(fp8.transposed.is_some(), trainable);
                if let Some(across) = fp8.transposed {
                    let [o, i] = [spec.shape[spec.shape.len() - 2], spec.shape[spec.shape.len() - 1]];
                    let turned = |bytes: &[u8], [o, i]: [usize; 2], width: usize| -> Vec<u8> {
                        let at = |m: usize, r: usize, c: usize| &bytes[((m * o + r) * i + c) * width..][..width];
                        let num = bytes.len() / (o * i * width);
                        let places = (0..num).flat_map(|m| (0..i).flat_map(move |c| (0..o).map(move |r| (m, r, c))));
                        places.flat_map(|(m, r, c)| at(m, r, c).to_vec()).collect()
                    };
                    let blocks = [o, i].map(|n| n.div_ceil(TILE));
                    let want = (turned(&file.0, [o, i], 1), turned(&file.1, blocks, 4));
                    assert!(bytes_in(&memory, across) == want, "{} across", spec.name);
                }
                // Where a value is kept, it is what the codes stand for, in bf16.
                if !fp8.is_all {
                    let want = checkpoint.folder.read_param(&spec).unwrap();
                    let want: Vec<half::bf16> = want.into_iter().map(half::bf16::from_f32).collect();
                    assert!(memory.download::<half::bf16>(weight.value) == want, "{}", spec.name);
                }
            }
        }
    }
}

#[test]
fn a_rank_of_some_experts_takes_their_codes_only() {
    let dir = folder(CONFIG, Codes::Foreign);
    let tensors = load(&dir.path().join("model.safetensors"));
    let opened = HfFolder::open(dir.path()).unwrap();
    let specs = param_specs_where(&opened.model().unwrap().config, 2..4, |_, _| true);
    let memory = Memory::new(Device::Cpu);
    let parameters = Parameters::allocate(specs, &memory, &Formats::of(Compute::Fp8), false);
    let report = fill(&memory, &parameters, Weights::Folder(&opened)).unwrap();
    assert_eq!(report.num_fp8_rounded, 0);
    for (spec, weight) in parameters.iter() {
        if let Some(fp8) = weight.fp8 {
            assert!(bytes_in(&memory, fp8.blocks) == bytes_of(&tensors, spec), "{}", spec.name);
        }
    }
    let down = parameters.get("model.layers.1.mlp.experts.down_proj");
    assert_eq!(down.fp8.unwrap().blocks.codes.shape, *[2, 160, 128].as_slice());
}

/// An app over a folder whose weights were decoded, and rounded again: what this program did of itself.
fn decoded(dir: &Path) -> Checkpoint {
    let values = open(dir, false);
    let folder = HfFolder::open(dir).unwrap();
    let parameters = values.app.world().resource::<Parameters>();
    let memory = values.app.world().resource::<Tensors>().memory();
    fill(memory, parameters, Weights::of(|spec| Ok(folder.read_param(spec).unwrap()))).unwrap();
    values
}

fn logits(checkpoint: &mut Checkpoint) -> Vec<f32> {
    let batch = Batch::of_rows((0..24).map(|i| i * 7 % 40).collect(), 12);
    let probe = Probe::new(&checkpoint.app, &batch);
    let (_, logits) = probe.logits(&mut checkpoint.app).unwrap();
    systems::model::download(checkpoint.app.world().resource::<Tensors>().memory(), logits)
}

#[test]
fn logits_are_those_of_products_with_these_codes() {
    for (codes, is_reproduced) in [(Codes::Reproducible, true), (Codes::Foreign, false)] {
        let dir = folder(CONFIG, codes);
        let (mut native, mut again) = (open(dir.path(), false), decoded(dir.path()));
        let mut by_hand = decoded(dir.path());
        let memory = by_hand.app.world().resource::<Tensors>().memory().clone();
        let tensors = load(&dir.path().join("model.safetensors"));
        let weights = in_8_bits(&by_hand.app);
        let is_same =
            |(spec, w): &(ParamSpec, Weight)| bytes_in(&memory, w.fp8.unwrap().blocks) == bytes_of(&tensors, spec);
        let num_same = weights.iter().filter(|w| is_same(w)).count();
        assert_eq!(num_same, if is_reproduced { weights.len() } else { 0 }, "codes that rounding gives back");
        let got = logits(&mut native);
        assert!(got.iter().all(|x| x.is_finite()) && got.iter().any(|x| x.abs() > 1e-3));
        assert_eq!(got == logits(&mut again), is_reproduced, "logits after decoding and rounding");
        // The file's bytes put under the products by hand.
        for (spec, w) in &weights {
            let (codes, scales) = bytes_of(&tensors, spec);
            let blocks = w.fp8.unwrap().blocks;
            memory.upload(blocks.codes, &codes);
            let scales: Vec<f32> = scales.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            memory.upload(blocks.scales, &scales);
        }
        assert!(got == logits(&mut by_hand), "logits of the file's codes");
    }
}

/// DeepGEMM's measure of how far two results are apart: 1 - 2 x y / (x x + y y).
fn calc_diff(x: &[f64], y: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    1.0 - 2.0 * dot(x, y) / (dot(x, x) + dot(y, y))
}

#[test]
fn products_are_those_of_the_decoded_weights_in_f64() {
    const T: usize = 6;
    let dir = folder(CONFIG, Codes::Foreign);
    let tensors = load(&dir.path().join("model.safetensors"));
    let checkpoint = open(dir.path(), false);
    let memory = checkpoint.app.world().resource::<Tensors>().memory().clone();
    let mut s = Stream::new("compute", &memory, &Arc::new(Hazards::default())).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (spec, weight) in in_8_bits(&checkpoint.app) {
        let (e, o, i) = match spec.shape[..] {
            [o, i] => (1, o, i),
            [e, o, i] => (e, o, i),
            _ => panic!("{:?}", spec.shape),
        };
        let x: Vec<f32> = (0..T * i).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect();
        let (x, q) = (memory.from_slice(&[T, i], &x), Tiles::alloc(&memory, T, i));
        let y = memory.alloc(DType::F32, &[T, o]);
        let blocks = weight.fp8.unwrap().blocks;
        quantize::tiles(&mut s, x, q, Default::default()).unwrap();
        // Of two experts one has most rows, and others none.
        let offsets: Vec<u32> = (0..=e as u32).map(|i| if i < 2 { i } else { T as u32 }).collect();
        let expert_of = |row: usize| offsets.iter().rposition(|&first| first as usize <= row).unwrap().min(e - 1);
        if spec.shape.len() == 3 {
            let offsets = memory.from_slice(&[e + 1], &offsets);
            fp8_grouped_gemm::product(&mut s, q, offsets, blocks, y).unwrap();
        } else {
            fp8_gemm::product(&mut s, q, blocks, None, y).unwrap();
        }
        s.synchronize().unwrap();
        let (codes, scales) = (memory.download::<u8>(q.codes), memory.download::<f32>(q.scales));
        let x = |t: usize, c: usize| {
            f64::from(decode_e4m3(codes[t * i + c])) * f64::from(scales[c / TILE * T.next_multiple_of(4) + t])
        };
        // From the file, tensor by tensor.
        let rows = spec.views[0].shape[0];
        let w = |expert: usize, r: usize, c: usize| {
            let name = &spec.views[(expert * o + r) / rows].hf_name;
            let (bytes, factors) = (&tensors[name].2, &tensors[&format!("{name}_scale_inv")].2);
            let r = (expert * o + r) % rows;
            let factor = factors.as_chunks::<4>().0[r / TILE * i.div_ceil(TILE) + c / TILE];
            f64::from(decode_e4m3(bytes[r * i + c])) * f64::from(f32::from_le_bytes(factor))
        };
        let want: Vec<f64> =
            (0..T * o).map(|at| (0..i).map(|c| x(at / o, c) * w(expert_of(at / o), at % o, c)).sum()).collect();
        let got: Vec<f64> = memory.download::<f32>(y).into_iter().map(f64::from).collect();
        assert!(calc_diff(&got, &want) < 1e-6, "{}: {}", spec.name, calc_diff(&got, &want));
    }
}

fn report_of(dir: &Path) -> (WeightsReport, Vec<String>) {
    let notes = Arc::new(Notes::default());
    let told: Arc<dyn Progress> = notes.clone();
    let checkpoint = Checkpoint::load(dir, (Compute::Fp8, Device::Cpu), 64, false, &told).unwrap();
    let notes = notes.0.lock().unwrap().clone();
    (checkpoint.weights(), notes)
}

#[test]
fn what_products_cannot_take_is_rounded_and_told_of_once() {
    // Gate and up of 96 rows share blocks when they lie below each other; down has blocks of its own.
    let narrow = CONFIG.replace("\"moe_intermediate_size\": 128", "\"moe_intermediate_size\": 96");
    let (report, notes) = report_of(folder(&narrow, Codes::Foreign).path());
    assert_eq!((report.num_fp8_as_stored, report.num_fp8_rounded), (14, 2), "{report:?}");
    let why = "model.layers.1.mlp.experts.gate_up_proj: it packs matrices of 96 rows below each other";
    assert!(report.first_fp8_rounded.as_ref().is_some_and(|first| first.starts_with(why)), "{report:?}");
    let told = format!(
        "weights in 8 bits: 14 of 16 with the checkpoint's codes and scales; 2 rounded when they were read, the first {why}"
    );
    assert_eq!(notes.iter().filter(|note| note.starts_with(&told)).count(), 1, "{notes:?}");

    // Other blocks: a folder with twice as many factors.
    let dir = folder(CONFIG, Codes::Foreign);
    let path = dir.path().join("model.safetensors");
    let mut tensors = load(&path);
    let shapes: Vec<_> =
        tensors.iter().filter(|(_, t)| t.0 == Dtype::F8_E4M3).map(|(n, t)| (n.clone(), t.1.clone())).collect();
    for (name, shape) in shapes {
        let blocks = [shape[0].div_ceil(64), shape[1].div_ceil(128)];
        let factors = vec![2f32.powi(-13); blocks[0] * blocks[1]];
        let bytes = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, blocks.to_vec(), bytes));
    }
    save(&path, &tensors);
    let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
    let mut document: serde_json::Value = serde_json::from_str(&config).unwrap();
    document["quantization_config"]["weight_block_size"] = serde_json::json!([64, 128]);
    fs::write(dir.path().join("config.json"), document.to_string()).unwrap();
    let (report, notes) = report_of(dir.path());
    assert_eq!((report.num_fp8_as_stored, report.num_fp8_rounded), (0, 16));
    assert!(notes.iter().any(|note| note.contains("blocks of 64 x 128, and products take 128 x 128")), "{notes:?}");

    // A checkpoint in bf16.
    let bf16 = tempfile::tempdir().unwrap();
    convert(folder(CONFIG, Codes::Written).path(), bf16.path(), Some(SaveDtype::Bf16), DEFAULT_SHARD_BYTES).unwrap();
    let (report, notes) = report_of(bf16.path());
    assert_eq!((report.num_fp8_as_stored, report.num_fp8_rounded), (0, 16));
    assert!(notes.iter().any(|note| note.contains("is stored in BF16")), "{notes:?}");
}

#[test]
fn damage_is_named() {
    let dir = folder(CONFIG, Codes::Foreign);
    let path = dir.path().join("model.safetensors");
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    let error = |of: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut tensors = load(&path);
        change(&mut tensors.get_mut(of).unwrap().2);
        let damaged = folder(CONFIG, Codes::Foreign);
        save(&damaged.path().join("model.safetensors"), &tensors);
        let silent: Arc<dyn Progress> = Arc::new(Silent);
        let loaded = Checkpoint::load(damaged.path(), (Compute::Fp8, Device::Cpu), 64, false, &silent);
        loaded.err().unwrap().to_string()
    };
    let found = error(name, &|bytes| bytes[161] = 0xff);
    assert!(found.contains(name) && found.contains("161") && found.contains("NaN"), "{found}");
    let factors = format!("{name}_scale_inv");
    let found = error(&factors, &|bytes| bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()));
    assert!(found.contains(&factors) && found.contains("inf"), "{found}");
    let found = error(&factors, &|bytes| bytes[4..8].copy_from_slice(&1e38f32.to_le_bytes()));
    assert!(found.contains(&factors) && found.contains("inf"), "a factor that makes numbers infinite: {found}");
}

#[test]
fn a_conversion_to_fp8_keeps_what_is_in_it() {
    for codes in [Codes::Written, Codes::Foreign] {
        let source = folder(CONFIG, codes);
        let destination = tempfile::tempdir().unwrap();
        convert(source.path(), destination.path(), Some(SaveDtype::Fp8), DEFAULT_SHARD_BYTES).unwrap();
        let (before, after) = (source.path().join("model.safetensors"), destination.path().join("model.safetensors"));
        assert!(load(&before) == load(&after), "every code and factor");
        let (native, _) = report_of(destination.path());
        assert_eq!((native.num_fp8_as_stored, native.num_fp8_rounded), (16, 0));
    }
}

#[test]
fn inference_keeps_codes_alone() {
    let dir = folder(CONFIG, Codes::Foreign);
    let (native, high) = (open(dir.path(), false), {
        let silent: Arc<dyn Progress> = Arc::new(Silent);
        Checkpoint::load(dir.path(), (Compute::Bf16, Device::Cpu), 64, false, &silent).unwrap()
    });
    let live = |checkpoint: &Checkpoint| checkpoint.app.world().resource::<Tensors>().memory().live_bytes();
    // Each weight of such a product takes a byte instead of two, and its factors; all but the one that generation needs.
    let saved: u64 = in_8_bits(&native.app)
        .iter()
        .map(|(spec, w)| {
            let fp8 = w.fp8.unwrap();
            assert_eq!(fp8.is_all, !spec.name.ends_with("kv_b_proj.weight"));
            if fp8.is_all { 2 * spec.num_elements() as u64 - fp8.num_bytes() } else { 0 }
        })
        .sum();
    let added: u64 = in_8_bits(&native.app)
        .iter()
        .filter_map(|(_, w)| w.fp8.filter(|fp8| !fp8.is_all).map(|fp8| fp8.num_bytes()))
        .sum();
    assert_eq!(live(&native) + saved, live(&high) + added);
    assert_eq!(native.weights().bytes + saved, high.weights().bytes + added);
    assert!(native.app.world().resource::<Model>().head.is_some());
}
