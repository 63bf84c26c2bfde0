//! C_mn = A_mk B_kn (+ bias), or D_mn + A_mk B_kn, in bf16 with f32 sums on Hopper's tensor cores; dense and grouped.
//!
//! Signature: as in [`super::schedule`], a and b tensor maps; where C is written by TMA, its map comes last. Needs sm_90a.
//!
//! Persistent: a block takes tile after tile of [`BM`] x `bn`, `%nctaid` apart. A producer warpgroup, of which one thread works, keeps
//! `stages` buffers of [`BK`] elements of k filled by TMA; two consumer warpgroups multiply 64 x `bn` each by wgmma from shared
//! memory. While they write a tile, the producer fills buffers for the next.
//!
//! Shared memory, 128-byte swizzled, every part aligned to 1024 bytes:
//! - A, contiguous along k: 128 rows of 64 k; along m: two panels (one a consumer) of 64 rows of k, 64 m each
//! - B, contiguous along k: `bn` rows of 64 k; along n: `bn / 64` panels of 64 rows of k, 64 n each
//! - after the stages: 16 KiB for each consumer, where a part of the tile is turned into rows (see `epilogue`)
//! - barriers: full\[stages\], empty\[stages\]
//!
//! Barriers: `full` has one arrival, the producer's, and the bytes it expects; `empty` has eight, one of each consumer warp, when its
//! reads of the buffer are over: after `wait_group 1` that of the tile before, so that one wgmma group is always in flight. The
//! producer waits on `empty` with the phase inverted, so that the first round passes.
//!
//! Groups: TMA reads whole tiles, whoever's rows those are.
//! - rows: rows of A past the group's give rows of C that are not written; the weights' map has the group as a third axis, so
//!   that what lies past a weight's end is zero and not the next weight
//! - k: elements of k past the group's are zeroed in shared memory by the consumers (both operands, since 0 times NaN is not 0),
//!   in the last tile alone: then `fence.proxy.async`, and a barrier of both consumers before wgmma reads
//!
//! Bound by tensor cores: 2 m n k FLOPs (H100, H200: 989 TFLOP/s); a tile of 128 x 256 reads 96 bytes of L2 for 32768 products.

mod consumer;
mod producer;

use super::{
    super::{
        Arch, Arg, Kernel, Launch, TensorMap, VERSION,
        asm::{Assembler, B32, Label, Pred, Reg},
    },
    Target,
    cost::{self, Size},
    epilogue::{self, staging_bytes},
    pipeline::map,
    problem::{Groups, Problem, Spec},
    schedule::Params,
};
use crate::ptx;

/// Sizes of a block's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub(super) bn: u32,
    pub(super) stages: u32,
}

/// For many tiles.
pub(super) const LARGE: Tile = Tile { bn: 256, stages: 4 };
/// For fewer.
pub(super) const SMALL: Tile = Tile { bn: 128, stages: 6 };
/// For few, where reading B is what takes long.
pub(super) const NARROW: Tile = Tile { bn: 64, stages: 8 };
/// All.
pub(super) const TILES: [Tile; 3] = [LARGE, SMALL, NARROW];
/// Rows of a tile: 64 a consumer.
const BM: u32 = 128;
/// Elements of k in a tile: 128 bytes.
const BK: u32 = 64;
/// Threads of both consumers; the producer's 128 follow.
const CONSUMERS: u32 = 256;
/// Bytes of A in a stage.
const A_BYTES: u32 = BM * BK * 2;
/// Columns that a consumer turns into rows at a time.
const WIDTH: u32 = 64;

impl Tile {
    pub(super) fn name(self) -> String {
        format!("{BM}x{}_s{}", self.bn, self.stages)
    }

    fn size(self) -> Size {
        Size { bm: BM, bn: self.bn, blocks: 1 }
    }

    fn b_bytes(self) -> u32 {
        self.bn * BK * 2
    }

    fn stage_bytes(self) -> u32 {
        A_BYTES + self.b_bytes()
    }

    fn staging(self) -> u32 {
        self.stage_bytes() * self.stages
    }

    fn barriers(self) -> u32 {
        self.staging() + 2 * staging_bytes(WIDTH)
    }

    fn shared_bytes(self) -> u32 {
        self.barriers() + 16 * self.stages
    }
}

/// The tile, if this kernel can: rows of A and B begin at 16 bytes, and there is a k.
pub(super) fn choose(on: Target, problem: &Problem) -> Option<Tile> {
    let spec = problem.spec();
    let is_inner = spec.kind.is_inner();
    // Groups without k are left alone, which is right only where C is added to.
    let can = on.arch >= Arch::Sm90a
        && spec.wide[0]
        && spec.wide[1]
        && problem.k > 0
        && (!is_inner || problem.adds_in_place());
    if !can {
        return None;
    }
    cost::quickest(on, problem, TILES.map(|tile| (tile, tile.size())))
}

/// As many blocks as run at one time.
pub(super) fn launch(on: Target, problem: &Problem, tile: Tile) -> Launch {
    let spec = problem.spec();
    let (a, b) = (a_map(problem), b_map(problem, tile));
    let mut args = vec![Arg::Map(a), Arg::Map(b)];
    args.extend(problem.args_after_operands());
    if epilogue::by_tma(&spec) {
        args.push(Arg::Map(map(problem.c, &[problem.n, problem.m], [64, 64], None)));
    }
    let grid = problem.max_tiles(BM, tile.bn).min(on.num_sms.max(1));
    Launch { kernel: kernel(spec, tile), grid: [grid, 1, 1], args }
}

fn a_map(problem: &Problem) -> TensorMap {
    if problem.layout.a_k_major() {
        map(problem.a, &[problem.k, problem.m], [BK, BM], None)
    } else {
        map(problem.a, &[problem.m, problem.k], [64, BK], None)
    }
}

fn b_map(problem: &Problem, tile: Tile) -> TensorMap {
    let third = match problem.groups {
        Groups::Rows { num, .. } | Groups::MaskedRows { num, .. } => Some((num, problem.group_stride())),
        _ => None,
    };
    if problem.layout.b_k_major() {
        map(problem.b, &[problem.k, problem.n], [BK, tile.bn], third)
    } else {
        map(problem.b, &[problem.n, problem.k], [64, BK], third)
    }
}

/// The kernel of a spec.
pub(super) fn kernel(spec: Spec, tile: Tile) -> Kernel {
    let name = format!("gemm_wgmma_{}_{}", spec.name(), tile.name());
    let emit = {
        let name = name.clone();
        move || emit(&name, &spec, tile)
    };
    Kernel {
        name,
        arch: Arch::Sm90a,
        block: CONSUMERS + 128,
        shared_bytes: tile.shared_bytes(),
        any_grid: false,
        emit: Box::new(emit),
    }
}

/// What producer and consumers have in common.
struct Block<'a> {
    spec: &'a Spec,
    tile: Tile,
    params: Params,
    tid: Reg<B32>,
    warp: Reg<B32>,
    lane: Reg<B32>,
    /// The first stage.
    base: Reg<B32>,
    /// The first barrier.
    barriers: Reg<B32>,
    end: Label,
}

impl Block<'_> {
    /// Bytes from a stage's full barrier to its empty one.
    fn to_empty(&self) -> u32 {
        8 * self.tile.stages
    }
}

fn emit(name: &str, spec: &Spec, tile: Tile) -> String {
    let mut kernel = Assembler::new(name);
    let k = &mut kernel;
    let shared = k.dynamic_shared(1024, "shared");
    k.directive(format!(".maxntid {}, 1, 1", CONSUMERS + 128));
    k.directive(".minnctapersm 1");
    let params = Params::declare(k, spec, Assembler::tensor_map);
    let c_map = epilogue::by_tma(spec).then(|| k.tensor_map("c_map"));
    let [tid, warp, lane, base, barriers] = [(); 5].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {tid}, %tid.x;");
    ptx!(k, "shr.u32 {warp}, {tid}, 5;");
    ptx!(k, "shfl.sync.idx.b32 {warp}, {warp}, 0, 31, 0xffffffff;");
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "mov.u32 {base}, {shared};");
    ptx!(k, "add.u32 {barriers}, {base}, {};", tile.barriers());
    let (q, ready, consume) = (k.reg::<Pred>(), k.label("READY"), k.label("CONSUME"));
    let block = Block { spec, tile, params, tid, warp, lane, base, barriers, end: k.label("END") };
    ptx!(k, "setp.ne.u32 {q}, {tid}, 0;");
    ptx!(k, "@{q} bra {ready};");
    for stage in 0..tile.stages {
        ptx!(k, "mbarrier.init.shared::cta.b64 [{barriers}+{}], 1;", 8 * stage);
        ptx!(k, "mbarrier.init.shared::cta.b64 [{barriers}+{}], {};", 8 * stage + block.to_empty(), CONSUMERS / 32);
    }
    for map in [Some(block.params.a), Some(block.params.b), c_map].into_iter().flatten() {
        ptx!(k, "prefetch.tensormap [{map}];");
    }
    ptx!(k, "fence.mbarrier_init.release.cluster;");
    k.place(&ready);
    ptx!(k, "bar.sync 0;");
    ptx!(k, "setp.lt.u32 {q}, {warp}, {};", CONSUMERS / 32);
    ptx!(k, "@{q} bra {consume};");
    ptx!(k, "setmaxnreg.dec.sync.aligned.u32 40;");
    producer::emit(k, &block);
    k.place(&consume);
    ptx!(k, "setmaxnreg.inc.sync.aligned.u32 232;");
    consumer::emit(k, &block, c_map);
    k.place(&block.end);
    ptx!(k, "ret;");
    kernel.finish(VERSION, Arch::Sm90a.target())
}

/// The number of tiles of k in `inner` elements.
fn tiles_of_k(k: &mut Assembler, inner: Reg<B32>) -> Reg<B32> {
    let tiles = k.reg::<B32>();
    ptx!(k, "add.u32 {tiles}, {inner}, {};", BK - 1);
    ptx!(k, "shr.u32 {tiles}, {tiles}, {};", BK.trailing_zeros());
    tiles
}
