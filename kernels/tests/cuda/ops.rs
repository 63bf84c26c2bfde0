//! What ops do on a GPU: what the processors do, and what they refuse with the same words.

use super::*;

/// Each op with an input that it must refuse; the error of a stream of that device, which is none for one that goes on afterwards.
fn refusals(device: Device) -> Vec<String> {
    use kernels::ops::{balance, cross_entropy, embedding, gate, mla, norm, permute, rope, sampling};
    type Op = Box<dyn Fn(&mut Stream, &Memory) -> kernels::error::Result<()>>;
    let nan = [1.0, 2.0, 3.0, 0.5, f32::NAN, 1.0];
    let x = move |m: &Memory| m.from_slice(&[2, 3], &nan);
    let ones = |m: &Memory, dims: &[usize]| m.from_slice(dims, &vec![1f32; dims.iter().product()]);
    let none = |m: &Memory, dims: &[usize]| m.from_slice(dims, &vec![0u32; dims.iter().product()]);
    let table =
        |m: &Memory| rope::Rope { theta: 1e4, dim: 2, yarn: None }.table(m, DType::F32, 8, rope::Pairs::HalfSplit);
    let ops: Vec<Op> = vec![
        Box::new(move |s, m| {
            let g = gate::Gate {
                score: gate::Score::Sigmoid,
                groups: None,
                norm_topk_prob: false,
                routed_scaling_factor: 1.0,
                mode: gate::Mode::Learned,
            };
            let out = gate::Outputs {
                scores: ones(m, &[2, 3]),
                indices: none(m, &[2, 1]),
                weights: ones(m, &[2, 1]),
                counts: none(m, &[3]),
            };
            gate::forward(s, g, x(m), None, out)
        }),
        Box::new(move |s, m| {
            let row = sampling::Sampling { temperature: 0.7, ..sampling::Sampling::GREEDY };
            sampling::forward(s, x(m), &[row; 2], none(m, &[2]))
        }),
        Box::new(move |s, m| {
            norm::check_finite(s, x(m), "3 F layer 1".into(), "scores".into());
            Ok(())
        }),
        Box::new(move |s, m| embedding::forward(s, m.from_slice(&[2], &[1u32, 7]), ones(m, &[5, 4]), ones(m, &[2, 4]))),
        Box::new(move |s, m| {
            embedding::weight_grad(s, m.from_slice(&[2], &[1u32, 7]), ones(m, &[2, 4]), ones(m, &[5, 4]))
        }),
        Box::new(move |s, m| {
            let passes = cross_entropy::Passes { nll: Some(ones(m, &[2])), dh: Some(ones(m, &[2, 4])), dw: None };
            cross_entropy::run(s, ones(m, &[2, 4]), ones(m, &[5, 4]), m.from_slice(&[2], &[1u32, 5]), 1.0, passes)
        }),
        Box::new(move |s, m| {
            let order =
                permute::Order { offsets: none(m, &[4]), row_of_slot: none(m, &[4]), token_of_row: none(m, &[4]) };
            permute::sort(s, m.from_slice(&[2, 2], &[0u32, 1, 2, 3]), order)?;
            permute::permute(s, ones(m, &[2, 8]), order, ones(m, &[4, 8]))
        }),
        Box::new(move |s, m| {
            let l = balance::SequenceLoss { alpha: 1.0, row_len: 2 };
            balance::sequence_loss(s, l, ones(m, &[2, 3]), m.from_slice(&[2, 1], &[0u32, 3]), ones(m, &[1]))
        }),
        Box::new(move |s, m| {
            balance::accumulate_counts(s, m.from_slice(&[2], &[1, u32::MAX]), m.from_slice(&[2], &[5u32, 5]))
        }),
        Box::new(move |s, m| rope::forward(s, ones(m, &[2, 4]), 0, m.from_slice(&[2], &[0u32, 8]), &table(m))),
        Box::new(move |s, m| {
            let projections = mla::Projections { kv_a: ones(m, &[2, 6]), kv_b: ones(m, &[2, 8]) };
            let (k, v) = (ones(m, &[2, 2, 4]), ones(m, &[2, 2, 2]));
            mla::assemble(s, projections, m.from_slice(&[2], &[0u32, 9]), &table(m), k, v)
        }),
    ];
    let memory = Memory::open(device).unwrap();
    let mut s = stream(&memory);
    s.begin_task(&Arc::from("boiler"));
    ops.into_iter()
        .map(|op| {
            op(&mut s, &memory).unwrap();
            let said = s.synchronize().unwrap_err().to_string();
            // The device is as before: an error of a kernel's input is none of its own.
            let (one, x) = (ones(&memory, &[3]), ones(&memory, &[3]));
            increment(&mut s, one, x);
            s.synchronize().unwrap();
            assert_eq!(memory.download::<f32>(x), [2.0; 3], "{said}");
            said
        })
        .collect()
}

#[test]
fn what_an_op_refuses_it_refuses_on_a_gpu_with_the_same_words() {
    on_standin("ops::refused_alike", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn refused_alike() {
    let (cpu, gpu) = (refusals(Device::Cpu), refusals(Device::Cuda(0)));
    assert_eq!(cpu, gpu);
    assert!(cpu[0].starts_with("gate: found NaN in `logits of token 1`"), "{cpu:#?}");
    assert!(cpu[3].starts_with("task `boiler` failed on stream `gpu`: expected tokens below"), "{cpu:#?}");
    assert_eq!(Memory::open(Device::Cuda(0)).unwrap().gpu().unwrap().host_ops().len(), 0);
}

#[test]
fn what_comes_with_a_launch_is_there_however_late_it_runs() {
    for seed in ["1", "2", "3"] {
        on_standin("ops::sampled", &[("PTXSIM_SEED", seed)]);
    }
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn sampled() {
    use kernels::ops::sampling::{Sampling, forward};
    let tokens = |device| {
        let memory = Memory::open(device).unwrap();
        let mut s = stream(&memory);
        let logits = memory.from_slice(&[1, 50], &(0..50).map(|i| (i * 7 % 13) as f32 * 0.2).collect::<Vec<_>>());
        let tokens = memory.alloc(DType::U32, &[40]);
        // More launches than there are pieces, whose numbers differ.
        for position in 0..40 {
            let row = Sampling { temperature: 1.5, top_k: 40, top_p: 0.95, min_p: 0.01, seed: 3, position };
            forward(&mut s, logits, &[row], tokens.slice(position as usize, 1)).unwrap();
        }
        s.synchronize().unwrap();
        memory.download::<u32>(tokens)
    };
    let (cpu, gpu) = (tokens(Device::Cpu), tokens(Device::Cuda(0)));
    assert_eq!(cpu, gpu);
    assert!(cpu.iter().any(|token| *token != cpu[0]));
}

#[test]
fn every_op_computes_what_the_processors_do() {
    for settings in [&[("PTXSIM_SEED", "1")][..], &[("PTXSIM_SEED", "2"), ("PTXSIM_COMPUTE", "8.6")]] {
        on_standin("ops::every_op", settings);
    }
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn every_op() {
    use kernels::check::{Row, Scale, run};
    let rows = run(Device::Cuda(0), Scale::Small, false, |row| eprintln!("{row}")).unwrap();
    let wrong: Vec<&Row> = rows.iter().filter(|row| !row.is_ok()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
