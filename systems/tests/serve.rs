//! Serving is generation: whatever else a model is asked, in whatever pieces a prompt is computed and wherever it lies in the cache, each
//! answer is that of the model alone, to the bit; and that is what a plain forward over the whole text says.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeSet, sync::Arc};

use bevy_app::App;
use engine::{
    control::{self, ControlHandle},
    prelude::*,
};
use serde_json::{Value, json};
use systems::{
    data::{packing::Batch, tokenizer::Tokenizer},
    formats::Formats,
    generate::{Answer, Collected, run_to_rest},
    hf::config::HfConfig,
    local::Silent,
    model::{self, initial_values},
    probe::Probe,
    ranks::Ranks,
    scene::{Compute, Recompute},
    serve::{
        CacheFormat, Capacity, Counters, Event, FinishReason, Params, Prefill, ServePlugin, Server, Service,
        Submission, Task, WatchPlugin, schedule::Limits,
    },
    session::{ModelSetup, app_with_model},
    weights::Weights,
    work::Work,
};

/// Latent attention, experts of which one is shared, and an MTP module; few tokens, so that the module is right now and then.
const DEEPSEEK: &str = r#"{
    "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "intermediate_size": 20, "moe_intermediate_size": 8, "n_routed_experts": 6, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100.0, "initializer_range": 0.4
}"#;

/// Grouped queries, and no experts.
const QWEN: &str = r#"{
    "model_type": "qwen2", "vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 100.0, "tie_word_embeddings": true, "initializer_range": 0.4
}"#;

fn app(config: &str, compute: Compute) -> App {
    let config = serde_json::from_str::<HfConfig>(config).unwrap().resolve().unwrap();
    let setup = ModelSetup {
        config: &config,
        formats: Formats::of(compute),
        max_positions: 256,
        trainable: false,
        recompute: Recompute::Off,
        progress: Arc::new(Silent),
        ranks: Ranks::solo(config.num_hidden_layers),
        num_threads: None,
        device: kernels::device::Device::Cpu,
        on_gpu: systems::on_gpu::OnGpu::default(),
        clock: Clock::Wall,
    };
    app_with_model(setup, Weights::of(|spec| Ok(initial_values(spec, &config, 5)))).unwrap()
}

/// Its texts are not looked at: token ids are.
fn tokenizer() -> Arc<Tokenizer> {
    let text = "a tokenizer is asked for, and its text is not looked at ".repeat(9);
    Arc::new(Tokenizer::train(&[text], 257).unwrap())
}

fn server(config: &str, compute: Compute, capacity: Capacity) -> (App, Service) {
    let mut app = app(config, compute);
    let service = Server::start(app.world_mut(), tokenizer(), capacity).unwrap();
    app.world_mut().resource_mut::<Server>().then = Some(Work::Rest);
    app.add_plugins(ServePlugin);
    (app, service)
}

/// Room for many.
fn wide() -> Capacity {
    let limits = Limits { step_tokens: 48, max_running: 24 };
    Capacity { cache_tokens: 4096, block_tokens: 8, limits, max_queued: 64, ..Capacity::one(128) }
}

/// A request: its prompt, and how it goes on.
type Asked = (Vec<u32>, Params);

/// Answers all of `asked`, handed in together.
fn answers(app: &mut App, service: &Service, asked: &[Asked]) -> Vec<Collected> {
    let ask =
        |(prompt, params): &Asked| Answer::ask(service, prompt.clone(), Task::Generate(params.clone()), None).unwrap();
    let answers: Vec<Answer> = asked.iter().map(ask).collect();
    app.insert_resource(Work::Serve).insert_resource(Exit::default());
    run_to_rest(app).unwrap();
    let server = app.world().resource::<Server>();
    assert_eq!(server.pool().num_free(), server.pool().num_blocks(), "no block is left held");
    assert_eq!(service.stats().num_waiting, 0);
    answers.iter().map(Answer::get).collect()
}

fn counters(app: &App) -> Counters {
    app.world().resource::<Server>().counters().clone()
}

fn tokens(answers: &[Collected]) -> Vec<Vec<u32>> {
    answers.iter().map(|answer| answer.tokens.clone()).collect()
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Requests of all lengths, a third of which begin alike.
fn mix(num: usize, vocab: usize, temperature: f64) -> Vec<Asked> {
    let mut random = Random(7);
    let common: Vec<u32> = (0..40).map(|_| random.below(vocab) as u32).collect();
    let mut request = |i: usize| {
        let own = (0..1 + random.below(if i.is_multiple_of(7) { 70 } else { 20 })).map(|_| random.below(vocab) as u32);
        let own: Vec<u32> = own.collect();
        let prompt =
            if i.is_multiple_of(3) { [&common[..20 + i % 20], &own[..own.len().min(30)]].concat() } else { own };
        let max_tokens = 1 + random.below(24);
        (prompt, Params { max_tokens, temperature, seed: i as u64, ignore_eos: true, ..Params::default() })
    };
    (0..num).map(&mut request).collect()
}

/// What the model says to each request when it is asked nothing else, in one piece.
fn alone(config: &str, compute: Compute, cache: CacheFormat, asked: &[Asked]) -> Vec<Vec<u32>> {
    let limits = Limits { step_tokens: 256, max_running: 1 };
    let (mut app, service) = server(config, compute, Capacity { limits, cache, ..Capacity::one(128) });
    asked.iter().flat_map(|request| tokens(&answers(&mut app, &service, std::slice::from_ref(request)))).collect()
}

#[test]
fn sixty_four_requests_at_a_time_get_the_answers_of_one_at_a_time() {
    let plain = CacheFormat::Compute;
    for (config, compute, vocab, cache) in [
        (DEEPSEEK, Compute::F32, 11, plain),
        (DEEPSEEK, Compute::Bf16, 11, plain),
        (DEEPSEEK, Compute::F32, 11, CacheFormat::Fp8),
        (DEEPSEEK, Compute::Bf16, 11, CacheFormat::Fp8),
        (QWEN, Compute::F32, 41, plain),
    ] {
        for temperature in [0.0, 1.0] {
            let asked = mix(64, vocab, temperature);
            let want = alone(config, compute, cache, &asked);
            let (mut app, service) = server(config, compute, Capacity { cache, ..wide() });
            assert_eq!(tokens(&answers(&mut app, &service, &asked)), want, "together");
            let first = counters(&app);
            assert!(first.num_steps < 200, "requests share steps: {first:?}");
            // Once more: now the cache has their prompts.
            assert_eq!(tokens(&answers(&mut app, &service, &asked)), want, "from the cache");
            let cached = counters(&app).num_cached_tokens - first.num_cached_tokens;
            assert!(cached > first.num_cached_tokens && cached > 500, "{cached} tokens were found");
        }
    }
}

#[test]
fn a_cache_that_is_too_small_changes_no_answer() {
    let asked = mix(64, 11, 1.0);
    for cache in [CacheFormat::Compute, CacheFormat::Fp8] {
        let want = alone(DEEPSEEK, Compute::F32, cache, &asked);
        let (mut app, service) = server(DEEPSEEK, Compute::F32, Capacity { cache_tokens: 128, cache, ..wide() });
        assert_eq!(tokens(&answers(&mut app, &service, &asked)), want);
        assert!(counters(&app).num_preemptions > 5, "{:?}", counters(&app));
    }
}

#[test]
fn what_a_module_proposes_changes_no_answer() {
    for (temperature, cache) in [(0.0, CacheFormat::Compute), (0.7, CacheFormat::Compute), (0.7, CacheFormat::Fp8)] {
        let asked = mix(64, 11, temperature);
        let want = alone(DEEPSEEK, Compute::F32, cache, &asked);
        for capacity in [Capacity { cache, ..wide() }, Capacity { cache_tokens: 128, cache, ..wide() }] {
            let (mut app, service) = server(DEEPSEEK, Compute::F32, Capacity { speculate: true, ..capacity });
            let answers = answers(&mut app, &service, &asked);
            assert_eq!(tokens(&answers), want);
            let counted = counters(&app);
            let (drafted, accepted) = (counted.num_drafted_tokens, counted.num_accepted_tokens);
            assert!(drafted > 300 && accepted > 10 && accepted < drafted, "{counted:?}");
            let told = answers.iter().map(|answer| answer.finish.as_ref().unwrap().num_accepted_tokens as u64);
            assert_eq!(told.sum::<u64>(), accepted);
        }
    }
}

#[test]
fn greedy_answers_are_those_of_a_plain_forward_over_the_whole_text() {
    for (config, vocab) in [(DEEPSEEK, 11), (QWEN, 41)] {
        let asked = mix(64, vocab, 0.0);
        let (mut app, service) = server(config, Compute::F32, wide());
        let got = tokens(&answers(&mut app, &service, &asked));
        let mut plain = self::app(config, Compute::F32);
        for ((prompt, _), answer) in asked.iter().zip(&got) {
            let text = [&prompt[..], answer].concat();
            let probe = Probe::new(&plain, &Batch::of_rows(text.clone(), text.len()));
            let (_, logits) = probe.logits(&mut plain).unwrap();
            let logits = model::download(plain.world().resource::<Tensors>().memory(), logits);
            for (row, token) in logits.chunks_exact(vocab).skip(prompt.len() - 1).zip(answer) {
                let best = (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best });
                assert_eq!(best, *token as usize, "{row:?}");
            }
            Plans::despawn(plain.world_mut(), &PlanKey("logits".into()));
        }
    }
}

/// Log-probabilities of all tokens after a prompt, by token: logits but for a constant. Without experts: where rounding changes one
/// that is chosen, there is no bound.
fn first_logprobs(cache: CacheFormat, prompt: &[u32]) -> Vec<f64> {
    let config = DEEPSEEK.replace("\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 2");
    let (mut app, service) = server(&config, Compute::Bf16, Capacity { cache, ..wide() });
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let sink = move |event: Event| {
        if let Event::Token(token) = event {
            tell.send(token.logprob.unwrap().top).unwrap();
        }
        true
    };
    let params = Params { max_tokens: 1, temperature: 0.0, ignore_eos: true, logprobs: Some(11), ..Params::default() };
    let (prompt, task) = (prompt.to_vec(), Task::Generate(params));
    service.submit(Submission { prompt, task, priority: 0, sink: Box::new(sink) }).unwrap();
    app.insert_resource(Work::Serve).insert_resource(Exit::default());
    run_to_rest(&mut app).unwrap();
    let mut top = told.recv().unwrap();
    top.sort_by_key(|(token, _)| *token);
    top.into_iter().map(|(_, logprob)| f64::from(logprob)).collect()
}

/// DeepGEMM's measure of how two results differ, over prompts of 100 tokens and fewer: below 2e-3 with latents of 16 numbers.
#[test]
fn an_fp8_cache_changes_logits_by_what_rounding_does() {
    let prompts: Vec<Vec<u32>> = (1..=20).map(|n| (0..5 * n).map(|i| (i * i + i / 7 + n) % 11).collect()).collect();
    let all = |cache| prompts.iter().flat_map(|prompt| first_logprobs(cache, prompt)).collect::<Vec<f64>>();
    let (fp8, plain) = (all(CacheFormat::Fp8), all(CacheFormat::Compute));
    assert_eq!(fp8.len(), 20 * 11);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let diff = 1.0 - 2.0 * dot(&fp8, &plain) / (dot(&fp8, &fp8) + dot(&plain, &plain));
    assert!(diff > 1e-8 && diff < 2e-3, "{diff}");
}

#[test]
fn an_fp8_cache_is_smaller_and_for_latents_only() {
    let bytes = |config, compute, cache| {
        server(config, compute, Capacity { cache, ..wide() }).1.settings().cache_bytes_per_token
    };
    // 16 codes, a scale, and 4 numbers of bf16, in each of two layers.
    assert_eq!(bytes(DEEPSEEK, Compute::F32, CacheFormat::Fp8), 2 * (16 + 4 + 8));
    assert_eq!(bytes(DEEPSEEK, Compute::F32, CacheFormat::Compute), 2 * 4 * (16 + 4));
    let capacity = Capacity { cache: CacheFormat::Fp8, ..wide() };
    let error = Server::start(app(QWEN, Compute::F32).world_mut(), tokenizer(), capacity).err().unwrap();
    assert!(error.to_string().contains("an FP8 cache is for models with latent attention"), "{error}");
}

#[test]
fn keys_and_values_made_for_prompts_give_the_same_greedy_answers() {
    // Prompts of which most have 64 tokens and more.
    let asked: Vec<Asked> = mix(64, 11, 0.0)
        .into_iter()
        .enumerate()
        .map(|(i, (prompt, params))| ((0..60 + i % 40).map(|j| prompt[j % prompt.len()]).collect(), params))
        .collect();
    for cache in [CacheFormat::Compute, CacheFormat::Fp8] {
        let limits = Limits { step_tokens: 256, max_running: 24 };
        let answer = |prefill| {
            let (mut app, service) = server(DEEPSEEK, Compute::F32, Capacity { limits, cache, prefill, ..wide() });
            tokens(&answers(&mut app, &service, &asked))
        };
        assert_eq!(answer(Prefill::ByCost), answer(Prefill::Absorbed), "{cache:?}");
    }
}

#[test]
fn an_embedding_is_the_mean_hidden_state_however_the_prompt_is_cut() {
    let prompts = mix(12, 11, 0.0).into_iter().map(|(prompt, _)| prompt);
    let embed = |capacity: Capacity, prompts: Vec<Vec<u32>>| {
        let (mut app, service) = server(DEEPSEEK, Compute::F32, capacity);
        let ask = |prompt: &Vec<u32>| Answer::ask(&service, prompt.clone(), Task::Embed, None).unwrap();
        let answers: Vec<Answer> = prompts.iter().map(ask).collect();
        app.insert_resource(Work::Serve).insert_resource(Exit::default());
        run_to_rest(&mut app).unwrap();
        answers.iter().map(|answer| answer.get().embedding).collect::<Vec<_>>()
    };
    let prompts: Vec<Vec<u32>> = prompts.collect();
    let together = embed(wide(), prompts.clone());
    let small =
        embed(Capacity { cache_tokens: 128, limits: Limits { step_tokens: 9, max_running: 3 }, ..wide() }, prompts);
    assert!(together.iter().all(|embedding| embedding.len() == 24 && embedding.iter().any(|x| *x != 0.0)));
    assert_eq!(together, small);
}

#[test]
fn requests_end_for_the_reason_they_say() {
    let (mut app, service) = server(DEEPSEEK, Compute::F32, wide());
    let prompt = vec![1, 2, 3];
    let base = Params { max_tokens: 20, temperature: 0.0, ignore_eos: true, ..Params::default() };
    let free = answers(&mut app, &service, &[(prompt.clone(), base.clone())]).remove(0);
    let finish = free.finish.unwrap();
    assert_eq!((finish.reason, finish.num_generated_tokens, finish.num_prompt_tokens), (FinishReason::Length, 20, 3));
    // A token that comes is one that may end it.
    let stop = free.tokens[7];
    let first = free.tokens.iter().position(|token| *token == stop).unwrap();
    let stopped = Params { stop_tokens: vec![stop], ..base.clone() };
    let stopped = answers(&mut app, &service, &[(prompt.clone(), stopped)]).remove(0);
    assert_eq!(stopped.tokens, free.tokens[..=first]);
    assert_eq!(stopped.finish.unwrap().reason, FinishReason::Stop);
}

#[test]
fn what_cannot_be_answered_is_refused() {
    let (_app, service) = server(DEEPSEEK, Compute::F32, Capacity { max_queued: 2, ..wide() });
    let ask = |prompt: Vec<u32>, max_tokens: usize| {
        let task = Task::Generate(Params { max_tokens, ..Params::default() });
        Answer::ask(&service, prompt, task, None).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(ask(vec![], 1).unwrap_err().contains("at least one token"));
    assert!(ask(vec![1, 11], 1).unwrap_err().contains("tokens below 11"));
    assert!(ask(vec![1; 100], 29).unwrap_err().contains("at most 128 tokens"));
    assert_eq!(ask(vec![1; 100], 28), Ok(()));
    assert_eq!(ask(vec![1], 1), Ok(()));
    assert!(ask(vec![1], 1).unwrap_err().contains("2 requests wait"));
    service.close();
    assert!(ask(vec![1], 1).unwrap_err().contains("shutting down"));
}

/// A server with somebody who watches.
fn watched(capacity: Capacity) -> (App, Service, ControlHandle) {
    let (mut app, service) = server(DEEPSEEK, Compute::F32, capacity);
    let (handle, inbox) = control::channel();
    app.add_plugins(WatchPlugin { name: "small".into(), inbox, note: Arc::new(|_| {}) });
    app.insert_resource(Work::Serve);
    (app, service, handle)
}

#[test]
fn who_watches_sees_numbers_of_requests_and_changes_no_answer() {
    let asked = mix(48, 11, 1.0);
    let want = alone(DEEPSEEK, Compute::F32, CacheFormat::Compute, &asked);
    let (mut app, service, handle) = watched(Capacity { cache_tokens: 128, ..wide() });
    let steps = handle.subscribe(4096);
    let ask =
        |(prompt, params): &Asked| Answer::ask(&service, prompt.clone(), Task::Generate(params.clone()), None).unwrap();
    let answers: Vec<Answer> = asked.iter().map(ask).collect();
    app.finish();
    app.cleanup();
    let (mut states, mut last) = (BTreeSet::new(), None);
    let (mut num_steps, mut num_generated) = (0, 0.0);
    while *app.world().resource::<Work>() == Work::Serve {
        let reply = handle.call("world.query", json!({ "components": ["Request"] }));
        app.update();
        let list = reply.try_recv().unwrap().unwrap();
        let views: Vec<&Value> =
            list["entities"].as_array().unwrap().iter().map(|entity| &entity["components"]["Request"]).collect();
        let known = [
            "id",
            "priority",
            "state",
            "num_prompt_tokens",
            "num_computed_tokens",
            "num_generated_tokens",
            "max_new_tokens",
            "num_blocks",
            "age_secs",
        ];
        for view in &views {
            let keys: Vec<&String> = view.as_object().unwrap().keys().collect();
            assert_eq!(keys, known, "numbers, and no text");
            let (prompt, params) = &asked[view["id"].as_u64().unwrap() as usize];
            assert_eq!(
                (&view["num_prompt_tokens"], &view["max_new_tokens"]),
                (&json!(prompt.len()), &json!(params.max_tokens))
            );
            let holds = view["num_blocks"].as_u64().unwrap() > 0;
            assert_eq!(view["state"] == "running", holds, "{view}");
            states.insert(view["state"].as_str().unwrap().to_owned());
        }
        // The list is of the time between the last step and this one.
        if let Some((running, waiting)) = last {
            let count = |state: &str| views.iter().filter(|view| view["state"] == state).count() as f64;
            assert_eq!((count("running"), count("waiting") + count("preempted")), (running, waiting));
        }
        let Ok(step) = steps.try_recv() else { continue };
        let of = |name: &str| step.scalar(name).unwrap_or_else(|| panic!("{name}: {:?}", step.scalars));
        last = Some((of("num_running"), of("num_waiting")));
        (num_steps, num_generated) = (num_steps + 1, num_generated + of("num_generated_tokens"));
        assert_eq!((step.step, of("num_blocks")), (num_steps, 16.0));
        assert_eq!(of("cache_usage"), of("num_used_blocks") / 16.0);
        let kinds: BTreeSet<&str> = step.spans.iter().map(|span| span.kind.0).collect();
        assert!(of("tokens_per_sec") > 0.0 && kinds.contains("attention_cached"), "{kinds:?}, {:?}", step.scalars);
        let loads = &step.histograms.iter().find(|(name, _)| name == "load/layer 1").unwrap().1;
        assert_eq!(loads.iter().sum::<f64>(), 2.0 * of("num_step_tokens"), "each token chooses two experts");
    }
    let got: Vec<Collected> = answers.iter().map(Answer::get).collect();
    assert_eq!(tokens(&got), want);
    assert_eq!(num_generated as usize, want.iter().map(Vec::len).sum::<usize>());
    assert_eq!(num_steps, counters(&app).num_steps, "every step is told");
    assert_eq!(states.iter().map(String::as_str).collect::<Vec<_>>(), ["preempted", "running", "waiting"]);
}

#[test]
fn a_server_can_be_paused_and_stopped_and_ends_all_the_same() {
    let long = Params { max_tokens: 100, temperature: 0.0, ignore_eos: true, ..Params::default() };
    let ask = |service: &Service| Answer::ask(service, vec![1, 2, 3], Task::Generate(long.clone()), None).unwrap();
    // Paused, and told to end: what it has taken is answered.
    let (mut app, service, handle) = watched(wide());
    app.world_mut().resource_mut::<Server>().then = None;
    app.finish();
    app.cleanup();
    let answer = ask(&service);
    (0..4).for_each(|_| app.update());
    let paused = handle.call("run.pause", Value::Null);
    (0..4).for_each(|_| app.update());
    let at = answer.get().tokens.len();
    assert_eq!((&paused.try_recv().unwrap().unwrap()["state"], at), (&json!("paused"), 4));
    let stepped = handle.call("run.step", Value::Null);
    (0..4).for_each(|_| app.update());
    assert_eq!((stepped.try_recv().unwrap().is_ok(), answer.get().tokens.len()), (true, at + 1));
    let refused = |method: &str, params| {
        let reply = handle.call(method, params);
        move || reply.try_recv().unwrap().unwrap_err().message
    };
    let (lr, saved) =
        (refused("run.set", json!({ "path": "lr", "value": 1e-3 })), refused("run.checkpoint", Value::Null));
    app.update();
    assert_eq!(lr(), "there is no live value `lr`; there are: none");
    assert!(saved().starts_with("there is no method `run.checkpoint`"));
    service.close();
    run_to_rest(&mut app).unwrap();
    assert_eq!(answer.get().finish.unwrap().num_generated_tokens, 100);

    // Stopped: who waits is told, with what there is.
    let (mut app, service, handle) = watched(wide());
    app.finish();
    app.cleanup();
    let answer = ask(&service);
    (0..4).for_each(|_| app.update());
    let _stopped = handle.call("run.stop", Value::Null);
    run_to_rest(&mut app).unwrap();
    let finish = answer.get().finish.unwrap();
    assert_eq!((finish.reason, finish.num_generated_tokens), (FinishReason::Cancelled, 4));
}
