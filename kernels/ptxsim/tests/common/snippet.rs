//! Short kernels: a body between a fixed head and tail, one output word for each thread.

use ptxsim::{Machine, Module};

/// How a body is run.
pub struct Snippet<'a> {
    pub body: &'a str,
    /// Directives of the entry and shared variables.
    pub directives: &'a str,
    pub shared: &'a str,
    pub grid: u32,
    pub block: u32,
    pub seed: u64,
    /// Words of input.
    pub input: Vec<u32>,
    /// Words of output before the launch.
    pub output: Vec<u32>,
}

impl Default for Snippet<'_> {
    fn default() -> Self {
        Snippet {
            body: "",
            directives: "",
            shared: ".shared .align 1024 .b8 smem[16384];",
            grid: 1,
            block: 32,
            seed: 1,
            input: vec![],
            output: vec![],
        }
    }
}

impl Snippet<'_> {
    /// The text: `%rd0` is the address of this thread's output word, `%rd1` that of the output, `%rd2` that of the input, `%r0`
    /// the thread's number within the block, `%r1` its lane, `%r2` the address of `smem`, `%r3` is 32-bit for the result.
    pub fn text(&self) -> String {
        format!(
            ".version 8.3\n.target sm_90a\n.address_size 64\n.visible .entry snippet(.param .u64 out, .param .u64 in)\n\
             {}\n{{\n{}\n.reg .pred %p<16>;\n.reg .b16 %h<16>;\n.reg .b32 %r<64>;\n.reg .b64 %rd<32>;\n.reg .f32 %f<80>;\n\
             .reg .f64 %fd<16>;\n\
             ld.param.u64 %rd1, [out];\nld.param.u64 %rd2, [in];\ncvta.to.global.u64 %rd1, %rd1;\n\
             mov.u32 %r0, %tid.x;\nmov.u32 %r1, %laneid;\nmov.u32 %r4, %ctaid.x;\nmov.u32 %r5, %ntid.x;\n\
             mad.lo.u32 %r6, %r4, %r5, %r0;\nmad.wide.u32 %rd0, %r6, 4, %rd1;\n{}\n{}\nret;\n}}\n",
            self.directives,
            self.shared,
            if self.shared.is_empty() { "" } else { "mov.u32 %r2, smem;" },
            self.body
        )
    }

    /// The output after the launch.
    pub fn run(&self) -> Result<Vec<u32>, String> {
        let module = Module::parse(&self.text())?;
        let mut m = Machine::new(self.seed);
        let words = self.output.len().max((self.grid * self.block) as usize);
        let mut output = self.output.clone();
        output.resize(words, 0);
        let bytes = |w: &[u32]| w.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (out, input) = (m.alloc(4 * words as u64), m.alloc(4 * self.input.len() as u64));
        m.write(out, &bytes(&output))?;
        m.write(input, &bytes(&self.input))?;
        let params = [out.to_le_bytes().to_vec(), input.to_le_bytes().to_vec()];
        m.launch(&module, [self.grid, 1, 1], [self.block, 1, 1], 0, &params)?;
        let mut back = vec![0; 4 * words];
        m.read(out, &mut back)?;
        Ok(back.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
    }
}

/// What a body of one warp gives.
pub fn run(body: &str) -> Result<Vec<u32>, String> {
    Snippet { body, ..Snippet::default() }.run()
}

/// The first word of a body that ends with a value in `%r3`.
pub fn value(body: &str) -> u32 {
    run(&format!("{body}\nst.global.b32 [%rd0], %r3;")).unwrap()[0]
}

/// The error of a body.
pub fn fault(body: &str) -> String {
    run(body).unwrap_err()
}
