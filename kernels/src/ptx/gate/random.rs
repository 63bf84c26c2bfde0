//! k of e experts without replacement, the same as on the CPU: Floyd's algorithm over ChaCha8, a thread a token.
//!
//! Signature (indices, t, seed low, seed high, step low, step high: u32). The key is (seed, step, 0, 0), the stream is the token, and
//! a draw below n is the high word of a random word times n, with Canon's correction by a second word: all as the crates rand and
//! rand_chacha do it. A draw takes two words at most, so ceil(2 k / 16) blocks of the cipher are enough; they lie in shared memory,
//! because which word is next depends on the draws.
//!
//! Time: about 600 integer instructions a token and block of the cipher; 4 k t bytes written.

use super::{Arg, Kernel, Launch, count, element, special};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Arch, VERSION,
        asm::{Assembler, B32, Pred, Reg},
        parts::return_past,
    },
    tensor::Tensor,
};

/// Threads of a block: 4 KiB of shared memory for each block of the cipher.
const THREADS: usize = 64;
/// Words of one block of the cipher.
const WORDS: usize = 16;

/// Assigns indices [t, k].
pub(super) fn random_distinct(seed: u64, step: u64, e: usize, indices: Tensor) -> Launch {
    let t = count(indices.rows());
    let mut args = vec![Arg::Tensor(indices), Arg::U32(t)];
    args.extend([seed, seed >> 32, step, step >> 32].map(|x| Arg::U32(x as u32)));
    Launch { kernel: kernel(e, indices.cols()), grid: [t.div_ceil(THREADS as u32), 1, 1], args }
}

pub(super) fn kernel(e: usize, num: usize) -> Kernel {
    let name = format!("gate_random_e{e}_k{num}");
    let emit = {
        let name = name.clone();
        move || {
            let mut k = Assembler::new(&name);
            k.directive(format!(".maxntid {THREADS}, 1, 1"));
            emit(&mut k, e, num);
            ptx!(k, "ret;");
            k.finish(VERSION, Arch::Sm80.target())
        }
    };
    Kernel { name, arch: Arch::Sm80, block: THREADS as u32, shared_bytes: 0, any_grid: false, emit: Box::new(emit) }
}

fn emit(k: &mut Assembler, e: usize, num: usize) {
    let (indices, t) = (k.pointer("indices"), k.u32("t"));
    let key = ["seed_low", "seed_high", "step_low", "step_high"].map(|name| k.u32(name));
    let num_blocks = (2 * num).div_ceil(WORDS);
    let words = k.shared(4, "words", 4 * num_blocks * WORDS * THREADS);
    let (tid, block, token, base) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<B32>(), special(k, &words));
    ptx!(k, "mad.lo.u32 {token}, {block}, {THREADS}, {tid};");
    return_past(k, token, t);
    ptx!(k, "mad.lo.u32 {base}, {tid}, 4, {base};");
    for i in 0..num_blocks {
        let out = cipher(k, key, i, token);
        for (w, x) in out.iter().enumerate() {
            ptx!(k, "st.shared.u32 [{base}+{}], {x};", 4 * THREADS * (i * WORDS + w));
        }
    }
    let slot = k.reg::<B32>();
    ptx!(k, "mul.lo.u32 {slot}, {token}, {num};");
    let to = element(k, indices, slot, DType::U32);
    let mut chosen: Vec<Reg<B32>> = vec![];
    for j in 0..num {
        let last = e - num + j;
        let drawn = draw(k, base, last + 1);
        for other in &chosen {
            let same = k.reg::<Pred>();
            // The draw may be replaced by the last number, which no earlier draw reaches.
            ptx!(k, "setp.eq.u32 {same}, {drawn}, {other};");
            ptx!(k, "@{same} mov.u32 {drawn}, {last};");
        }
        ptx!(k, "st.global.u32 [{to}+{}], {drawn};", 4 * j);
        chosen.push(drawn);
    }
}

/// A number below `n`; moves `next` past the words it took.
fn draw(k: &mut Assembler, next: Reg<B32>, n: usize) -> Reg<B32> {
    let step = 4 * THREADS;
    let (word, high, low) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "ld.shared.u32 {word}, [{next}];");
    ptx!(k, "add.u32 {next}, {next}, {step};");
    ptx!(k, "mul.hi.u32 {high}, {word}, {n};");
    ptx!(k, "mul.lo.u32 {low}, {word}, {n};");
    let (fair, carry, done) = (k.reg::<Pred>(), k.reg::<Pred>(), k.label("drawn"));
    ptx!(k, "setp.le.u32 {fair}, {low}, {};", (n as u32).wrapping_neg());
    ptx!(k, "@{fair} bra {done};");
    ptx!(k, "ld.shared.u32 {word}, [{next}];");
    ptx!(k, "add.u32 {next}, {next}, {step};");
    ptx!(k, "mul.hi.u32 {word}, {word}, {n};");
    ptx!(k, "add.u32 {word}, {word}, {low};");
    ptx!(k, "setp.lt.u32 {carry}, {word}, {low};");
    ptx!(k, "@{carry} add.u32 {high}, {high}, 1;");
    k.place(&done);
    high
}

/// Block `counter` of ChaCha8 of that stream.
fn cipher(k: &mut Assembler, key: [Reg<B32>; 4], counter: usize, stream: Reg<B32>) -> Vec<Reg<B32>> {
    let state: Vec<Reg<B32>> = k.regs(WORDS);
    let input: Vec<String> = [0x6170_7865u32, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]
        .map(|x| format!("0x{x:08x}"))
        .into_iter()
        .chain(key.map(|x| x.to_string()))
        .chain(["0", "0", "0", "0"].map(String::from))
        .chain([counter.to_string(), "0".into(), stream.to_string(), "0".into()])
        .collect();
    for (x, input) in state.iter().zip(&input) {
        ptx!(k, "mov.u32 {x}, {input};");
    }
    for _ in 0..4 {
        for column in 0..4 {
            quarter(k, &state, [0, 4, 8, 12].map(|row| row + column));
        }
        for column in 0..4 {
            quarter(k, &state, [0, 1, 2, 3].map(|row| 4 * row + (column + row) % 4));
        }
    }
    for (x, input) in state.iter().zip(&input) {
        ptx!(k, "add.u32 {x}, {x}, {input};");
    }
    state
}

fn quarter(k: &mut Assembler, state: &[Reg<B32>], [a, b, c, d]: [usize; 4]) {
    for (x, y, z, turn) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        let (x, y, z) = (state[x], state[y], state[z]);
        ptx!(k, "add.u32 {x}, {x}, {y};");
        ptx!(k, "xor.b32 {z}, {z}, {x};");
        ptx!(k, "shf.l.wrap.b32 {z}, {z}, {z}, {turn};");
    }
}
