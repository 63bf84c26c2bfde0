//! The sample kernels with inputs and references: what a launch of each came to.

pub mod snippet;

use ptxsim::{Machine, Module, TensorMapInfo};

/// Uniform numbers in [-1, 1).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub fn to_bf16(x: f32) -> u16 {
    let b = x.to_bits();
    ((b + 0x7fff + (b >> 16 & 1)) >> 16) as u16
}

pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

pub fn e4m3(code: u8) -> f32 {
    let (s, e, m) = (code >> 7, code >> 3 & 15, f32::from(code & 7));
    let v = if e == 0 { m / 8.0 * 2f32.powi(-6) } else { (1.0 + m / 8.0) * 2f32.powi(i32::from(e) - 7) };
    if s == 1 { -v } else { v }
}

pub struct Setup {
    pub machine: Machine,
    pub random: Random,
}

impl Setup {
    pub fn new(seed: u64) -> Self {
        Setup { machine: Machine::new(seed), random: Random::new(seed + 7) }
    }
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.machine.alloc(bytes.len() as u64);
        self.machine.write(at, bytes).unwrap();
        at
    }
    /// Random bf16 values, and where they are.
    pub fn bf16(&mut self, n: usize) -> (Vec<f32>, u64) {
        let bits: Vec<u16> = (0..n).map(|_| to_bf16(self.random.next())).collect();
        let at = self.put(&bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>());
        (bits.iter().map(|b| from_bf16(*b)).collect(), at)
    }
    pub fn e4m3(&mut self, n: usize) -> (Vec<f32>, u64) {
        // Codes of finite values of moderate size.
        let codes: Vec<u8> = (0..n)
            .map(|_| {
                let x = self.random.next();
                (x.abs() * 90.0) as u8 | if x < 0.0 { 0x80 } else { 0 }
            })
            .collect();
        let at = self.put(&codes);
        (codes.iter().map(|c| e4m3(*c)).collect(), at)
    }
    /// Positive scales.
    pub fn scales(&mut self, n: usize) -> (Vec<f32>, u64) {
        let x: Vec<f32> = (0..n).map(|_| 0.05 + self.random.next().abs()).collect();
        let at = self.put(&x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        (x, at)
    }
    pub fn f32s(&self, at: u64, n: usize) -> Vec<f32> {
        let mut bytes = vec![0; 4 * n];
        self.machine.read(at, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    pub fn bf16s(&self, at: u64, n: usize) -> Vec<f32> {
        let mut bytes = vec![0; 2 * n];
        self.machine.read(at, &mut bytes).unwrap();
        bytes.chunks_exact(2).map(|b| from_bf16(u16::from_le_bytes(b.try_into().unwrap()))).collect()
    }
}

/// A map of rows of `dims[0]` elements, swizzled by 128 bytes unless told otherwise.
pub fn map(address: u64, elem_bytes: u32, dims: [u64; 2], box_dims: [u32; 2], swizzle: u32) -> Vec<u8> {
    let strides = vec![dims[0] * u64::from(elem_bytes)];
    let info =
        TensorMapInfo { address, elem_bytes, dims: dims.to_vec(), strides, box_dims: box_dims.to_vec(), swizzle };
    info.encode().unwrap().to_vec()
}

/// D = A B^T of 64 x 128 x 64: the largest error.
pub fn tile_bf16(text: &str, seed: u64) -> Result<f32, String> {
    let module = Module::parse(text)?;
    let (m, n, k) = (64, 128, 64);
    let mut s = Setup::new(seed);
    let ((a, at_a), (b, at_b)) = (s.bf16(m * k), s.bf16(n * k));
    let at_d = s.machine.alloc(4 * (m * n) as u64);
    let params = [
        map(at_a, 2, [64, 64], [64, 64], 128),
        map(at_b, 2, [64, 128], [64, 128], 128),
        at_d.to_le_bytes().to_vec(),
        (n as u32).to_le_bytes().to_vec(),
    ];
    s.machine.launch(&module, [1; 3], [128, 1, 1], 0, &params)?;
    let d = s.f32s(at_d, m * n);
    let mut worst = 0f32;
    for i in 0..m {
        for j in 0..n {
            let want: f32 = (0..k).map(|q| a[i * k + q] * b[j * k + q]).sum();
            worst = worst.max((d[i * n + j] - want).abs());
        }
    }
    Ok(if d.iter().any(|x| x.is_nan()) { f32::NAN } else { worst })
}

/// A product of e4m3 with scales: the largest relative error.
pub fn fp8_gemm(text: &str, (m, n, k): (usize, usize, usize), grid: u32, seed: u64) -> Result<f32, String> {
    let module = Module::parse(text)?;
    let blocks = k.div_ceil(128);
    let mut s = Setup::new(seed);
    let ((a, at_a), (b, at_b)) = (s.e4m3(m * k), s.e4m3(n * k));
    let ((sa, at_sa), (sb, at_sb)) = (s.scales(blocks * m), s.scales(n.div_ceil(128) * blocks));
    let at_d = s.machine.alloc(2 * (m * n) as u64);
    let u = |x: usize| x as u64;
    let word = |x: usize| (x as u32).to_le_bytes().to_vec();
    let params = [
        map(at_a, 1, [u(k), u(m)], [128, 128], 128),
        map(at_b, 1, [u(k), u(n)], [128, 128], 128),
        map(at_sa, 4, [u(m), u(blocks)], [128, 1], 0),
        map(at_d, 2, [u(n), u(m)], [64, 128], 128),
        at_sb.to_le_bytes().to_vec(),
        word(m),
        word(n),
        word(k),
    ];
    let shared = 199_248 + 4 * blocks as u32;
    s.machine.launch(&module, [grid, 1, 1], [384, 1, 1], shared, &params)?;
    let d = s.bf16s(at_d, m * n);
    let mut worst = 0f32;
    for i in 0..m {
        for j in 0..n {
            let mut want = 0f32;
            for t in 0..blocks {
                let range = t * 128..((t + 1) * 128).min(k);
                let dot: f32 = range.map(|q| a[i * k + q] * b[j * k + q]).sum();
                want += sa[t * m + i] * sb[j / 128 * blocks + t] * dot;
            }
            worst = worst.max((d[i * n + j] - want).abs() / want.abs().max(1000.0));
        }
    }
    Ok(if d.iter().any(|x| x.is_nan()) { f32::NAN } else { worst })
}

/// Attention of 64 heads over a latent cache: the largest error.
pub fn mla_decode(text: &str, tokens: usize, seed: u64) -> Result<f32, String> {
    let module = Module::parse(text)?;
    let mut s = Setup::new(seed);
    let ((q, at_q), (kv, at_kv)) = (s.bf16(64 * 576), s.bf16(tokens * 576));
    let at_o = s.machine.alloc(4 * 64 * 512);
    let scale = 1.0 / 192f32.sqrt();
    let params = [
        map(at_q, 2, [576, 64], [64, 64], 128),
        map(at_kv, 2, [576, tokens as u64], [64, 64], 128),
        at_o.to_le_bytes().to_vec(),
        (tokens as u32).to_le_bytes().to_vec(),
        (scale * std::f32::consts::LOG2_E).to_le_bytes().to_vec(),
    ];
    s.machine.launch(&module, [1; 3], [384, 1, 1], 27 * 8192 + 64, &params)?;
    let o = s.f32s(at_o, 64 * 512);
    let mut worst = 0f32;
    for h in 0..64 {
        let dot = |t: usize| (0..576).map(|d| q[h * 576 + d] * kv[t * 576 + d]).sum::<f32>();
        let logits: Vec<f32> = (0..tokens).map(|t| scale * dot(t)).collect();
        let top = logits.iter().fold(f32::MIN, |a, b| a.max(*b));
        let p: Vec<f32> = logits.iter().map(|x| (x - top).exp()).collect();
        let z: f32 = p.iter().sum();
        for d in 0..512 {
            let want = (0..tokens).map(|t| p[t] * kv[t * 576 + d]).sum::<f32>() / z;
            let got = o[h * 512 + d];
            worst = if got.is_nan() { f32::NAN } else { worst.max((got - want).abs()) };
        }
    }
    Ok(worst)
}
