//! Which values a scene may have, and which sections need each other.
use super::*;

#[test]
fn values_are_checked() {
    let train = "train: (steps: 10)";
    let cases = [
        ("name: \"a/b\"", "name"),
        ("name: \"\"", "name"),
        ("init: \"nowhere\"", "init"),
        (train, "train train train train"),
        ("eval: ()", "eval"),
        ("sample: ()", "sample"),
        ("data: (train: [], tokenizer: Bpe(vocab_size: 300))", "data.train"),
        (
            "data: (train: \"no\", tokenizer: File(\".\"), validation: File(\"no\"))",
            "data.train[0] data.validation data.tokenizer",
        ),
        (
            "data: (train: \"Cargo.toml\", tokenizer: Bpe(vocab_size: 256), seq_len: 1)",
            "data.tokenizer.vocab_size data.seq_len",
        ),
        (
            "data: (train: \"Cargo.toml\", tokenizer: Bpe(vocab_size: 257), validation: HeldOut(fraction: 1))",
            "data.validation.fraction",
        ),
        ("batch: (microbatch_sequences: 0, num_microbatches: 0)", "batch.microbatch_sequences batch.num_microbatches"),
        (
            "batch: (ramp: [(step: 3, num_microbatches: 1), (step: 3, num_microbatches: 0)])",
            "batch.ramp[1].num_microbatches batch.ramp[1].step",
        ),
        (
            "routing: (bias_update_speed: -1, sequence_aux_loss: NaN, z_loss: inf)",
            "routing.bias_update_speed routing.sequence_aux_loss routing.z_loss",
        ),
        ("mtp: (loss_weight: -0.1)", "mtp.loss_weight"),
        (
            "optimizer: AdamW(beta1: 1, beta2: -1, eps: 0, weight_decay: -1)",
            "optimizer.beta1 optimizer.beta2 optimizer.eps optimizer.weight_decay",
        ),
        (
            "optimizer: Muon(momentum: 1, ns_steps: 0, lr_multiplier: 0, adamw: (eps: 0))",
            "optimizer.momentum optimizer.ns_steps optimizer.lr_multiplier optimizer.adamw.eps",
        ),
        ("schedule: Constant(lr: 0)", "schedule.lr"),
        ("schedule: Cosine(peak_lr: inf, final_lr_ratio: 1.5)", "schedule.peak_lr schedule.final_lr_ratio"),
        ("recompute: Selective([])", "recompute"),
        ("graphs: true", "graphs"),
        ("comm_sms: 20", "comm_sms"),
        ("device: Cuda(0), comm_sms: 20", ""),
        ("plan: (), comm_sms: 20", ""),
        ("tuning: \"missing.ron\"", "tuning tuning"),
        ("device: Cuda(0), tuning: \"missing.ron\"", "tuning"),
        ("recompute: Selective([Norm, Norm])", "recompute"),
        ("checkpoint: (every_steps: 0, keep_last: 0)", "checkpoint.every_steps checkpoint.keep_last"),
        (
            "telemetry: (log_every_steps: 0, trace_steps: (start: 0, count: 0))",
            "telemetry.log_every_steps telemetry.trace_steps.count",
        ),
        (
            "remote: (bind: \"no.such.host.invalid:0\")",
            if cfg!(feature = "remote") { "remote.bind" } else { "remote.bind remote" },
        ),
        ("seed: 2", ""),
    ];
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for (text, expected) in cases {
        let found: Vec<_> = parse(&format!("({text})")).check(&base).into_iter().map(|problem| problem.path).collect();
        assert_eq!(found.join(" "), expected, "{text}");
    }
}

#[test]
fn a_run_is_checked_as_a_whole() {
    let run = |rest: &str| {
        let text = format!(
            "(model: (), data: (train: \"Cargo.toml\", tokenizer: Bpe(vocab_size: 300)), optimizer: AdamW,
              train: (steps: 10), {rest})"
        );
        let problems = parse(&text).check(&PathBuf::from(env!("CARGO_MANIFEST_DIR")));
        problems.into_iter().map(|problem| problem.path).collect::<Vec<_>>().join(" ")
    };
    let wsd = |warmup: u64, decay: u64| {
        run(&format!("schedule: WarmupStableDecay(peak_lr: 1, warmup_steps: {warmup}, decay_steps: {decay})"))
    };
    assert_eq!(wsd(4, 6), "");
    assert_eq!(wsd(4, 7), "schedule.decay_steps");
    assert_eq!(wsd(11, 0), "schedule.warmup_steps");
    let constant = "schedule: Constant(lr: 1)";
    assert_eq!(run(&format!("{constant}, routing: (bias_warm_down_steps: 10)")), "");
    assert_eq!(run(&format!("{constant}, routing: (bias_warm_down_steps: 11)")), "routing.bias_warm_down_steps");
    assert_eq!(run(&format!("{constant}, telemetry: (trace_steps: (start: 9, count: 5))")), "");
    assert_eq!(
        run(&format!("{constant}, telemetry: (trace_steps: (start: 10, count: 1))")),
        "telemetry.trace_steps.start"
    );
}

#[test]
fn a_part_is_prefixed_with_its_section() {
    let problems = vec![Problem::new("n_group", "x").help("y"), Problem::new("", "x")];
    let found = prefix(problems, "model");
    assert_eq!(found, [Problem::new("model.n_group", "x").help("y"), Problem::new("model", "x")]);
}
