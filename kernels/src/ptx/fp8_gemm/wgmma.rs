//! C_mn = A_mk B_nk^T of E4M3 codes with scales on Hopper's tensor cores; dense and grouped.
//!
//! Signature: as in [`crate::ptx::gemm::schedule`], a and b tensor maps; then scale_a, a map; scale_b, a map (tiles) or an address (blocks); and
//! where C is written by TMA, its map. Needs sm_90a.
//!
//! Persistent: a block takes tile after tile of `bm` x `bn`. A producer warpgroup, of which one thread works, keeps `stages` buffers
//! of 128 of k filled by TMA; one or two consumer warpgroups make 64 or 128 rows each, 64 at a time: four wgmma of k 32, from zero,
//! then sum += product * (scale_a * scale_b) in registers. While one consumer does that, tensor cores are the other's.
//!
//! Clusters: two blocks, one below the other, work on two tiles of the same columns. Each reads one half of B's rows and sends it
//! to both.
//!
//! Shared memory, every part aligned to 1024 bytes but scales, to 128:
//! - of each stage A, `bm` rows of 128 codes, then B, `bn` rows, 128-byte-swizzled
//! - 8 KiB for each consumer, where a part of the tile is turned into rows (see [`crate::ptx::gemm::epilogue`])
//! - of each stage `bm` scales of A, then, if B has tiles, `bn` of B; B's scale of a block is one number, read from global memory
//!   one stage ahead
//! - barriers: full\[stages\], empty\[stages\]
//!
//! Barriers: `full` has one arrival, the producer's, and the bytes it expects, whoever sends them; `empty` has one of each consumer
//! warp of the cluster, when its last reads of the buffer are over. The producer waits on `empty` with the phase inverted, so that
//! the first round passes. A block of a cluster starts when both have their barriers, and ends when both have made their last
//! arrival at the other's.
//!
//! Rows past a group's are computed and not written; codes past a matrix's end are zeros, by TMA.
//!
//! Bound by tensor cores: 2 m n k FLOPs (H100, H200: 1979 TFLOP/s); a tile of 128 x 128 reads 256 bytes of L2 for 16384 products,
//! which is more than L2 gives; in a cluster 192.

mod consumer;
mod producer;

use super::{Problem, ScaleB, Spec, pitch};
use crate::{
    ptx,
    ptx::{
        Arch, Arg, Kernel, Launch, TensorMap, VERSION,
        asm::{Assembler, B32, B64, Label, Pred, Reg},
        gemm::{
            Groups, Matrix, Target,
            cost::{self, Size},
            epilogue::{self, staging_bytes},
            pipeline::map,
            schedule::Params,
        },
    },
};

/// Sizes of a block's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub(super) bm: u32,
    pub(super) bn: u32,
    pub(super) stages: u32,
    /// Blocks of a cluster.
    pub(super) blocks: u32,
}

/// Tiles for weights with blocks. Where the model cannot tell, the first: large tiles have fewer barriers for a product.
pub(super) const FOR_BLOCKS: [Tile; 7] = [
    Tile::new(256, 128, 2),
    Tile::new(256, 128, 1),
    Tile::new(128, 128, 2),
    Tile::new(128, 128, 1),
    Tile::new(64, 128, 1),
    Tile::new(64, 64, 1),
    Tile::new(64, 32, 1),
];
/// Tiles where both operands have tiles: a thread has scales of columns besides its sums, and no room for two sums.
pub(super) const FOR_TILES: [Tile; 4] =
    [Tile::new(128, 128, 2), Tile::new(128, 128, 1), Tile::new(64, 128, 1), Tile::new(64, 64, 1)];

/// Codes of k in a tile: 128 bytes.
const BK: u32 = 128;
/// Columns that a consumer turns into rows at a time.
const WIDTH: u32 = 32;
/// Bytes of shared memory that a block can have.
const SHARED_BYTES: u32 = 227 << 10;

impl Tile {
    /// With as many stages as fit, if B has tiles.
    const fn new(bm: u32, bn: u32, blocks: u32) -> Self {
        let mut tile = Tile { bm, bn, stages: 1, blocks };
        while tile.stages < 12 && tile.bytes_with(tile.stages + 1) <= SHARED_BYTES {
            tile.stages += 1;
        }
        tile
    }

    const fn bytes_with(self, stages: u32) -> u32 {
        stages * (self.stage_bytes() + self.scale_bytes(true) + 16) + self.consumers() * staging_bytes(WIDTH)
    }

    /// Consumer warpgroups.
    const fn consumers(self) -> u32 {
        if self.bm == 64 { 1 } else { 2 }
    }

    /// Times 64 rows that each makes.
    const fn parts(self) -> u32 {
        self.bm / 64 / self.consumers()
    }

    const fn consumer_threads(self) -> u32 {
        self.consumers() * 128
    }

    const fn a_bytes(self) -> u32 {
        self.bm * BK
    }

    const fn stage_bytes(self) -> u32 {
        self.a_bytes() + self.bn * BK
    }

    const fn scale_bytes(self, tiled: bool) -> u32 {
        4 * (self.bm + if tiled { self.bn } else { 0 })
    }

    const fn staging(self) -> u32 {
        self.stages * self.stage_bytes()
    }

    const fn scales(self) -> u32 {
        self.staging() + self.consumers() * staging_bytes(WIDTH)
    }

    const fn barriers(self, tiled: bool) -> u32 {
        self.scales() + self.stages * self.scale_bytes(tiled)
    }

    pub(super) fn name(self) -> String {
        let Tile { bm, bn, stages, blocks } = self;
        let cluster = if blocks > 1 { format!("_c{blocks}") } else { String::new() };
        format!("{bm}x{bn}_s{stages}{cluster}")
    }

    fn size(self) -> Size {
        Size { bm: self.bm, bn: self.bn, blocks: self.blocks }
    }
}

/// Tiles that can solve the problem: none unless rows of codes and scales begin at 16 bytes, and there is a k.
pub(super) fn candidates(on: Target, problem: &Problem) -> &'static [Tile] {
    let Spec { product: spec, tiled } = problem.spec();
    let aligned = |t: crate::tensor::Tensor| (t.offset * t.dtype.size_bytes() as u64).is_multiple_of(16);
    let scales = match problem.scale_b {
        ScaleB::Tiles(scales) => aligned(scales),
        ScaleB::Blocks(_) => true,
    } && aligned(problem.scale_a);
    let wide = spec.wide[0] && spec.wide[1] && scales;
    // Groups without k are left alone, which is right only where C is added to.
    if on.arch >= Arch::Sm90a
        && wide
        && problem.product.k > 0
        && (!spec.kind.is_inner() || problem.product.adds_in_place())
    {
        if tiled { &FOR_TILES } else { &FOR_BLOCKS }
    } else {
        &[]
    }
}

/// The tile, if this kernel can.
pub(super) fn choose(on: Target, problem: &Problem) -> Option<Tile> {
    cost::quickest(on, &problem.product, candidates(on, problem).iter().map(|tile| (*tile, tile.size())))
}

/// As many blocks as run at one time.
pub(super) fn launch(on: Target, problem: &Problem, tile: Tile) -> Launch {
    let Problem { product, scale_a, scale_b } = problem;
    let spec = problem.spec();
    let third = match product.groups {
        Groups::Rows { num, .. } | Groups::MaskedRows { num, .. } => Some((num, product.group_stride())),
        _ => None,
    };
    let a = map(product.a, &[product.k, product.m], [BK, tile.bm], None);
    let b = map(product.b, &[product.k, product.n], [BK, tile.bn / tile.blocks], third);
    let scales = |tensor, rows: u32, box_rows| {
        let matrix = Matrix { tensor, stride: pitch(rows) };
        TensorMap { swizzle: 0, ..map(matrix, &[rows, product.k.div_ceil(BK)], [box_rows, 1], None) }
    };
    let mut args = vec![Arg::Map(a), Arg::Map(b)];
    args.extend(product.args_after_operands());
    args.push(Arg::Map(scales(*scale_a, product.m, tile.bm)));
    args.push(match *scale_b {
        ScaleB::Tiles(tensor) => Arg::Map(scales(tensor, product.n, tile.bn)),
        ScaleB::Blocks(tensor) => Arg::Tensor(tensor),
    });
    if by_tma(&spec, tile) {
        args.push(Arg::Map(map(product.c, &[product.n, product.m], [64, 64], None)));
    }
    let clusters = product.max_tiles(tile.bm * tile.blocks, tile.bn).min((on.num_sms / tile.blocks).max(1));
    Launch { kernel: kernel(spec, tile), grid: [clusters * tile.blocks, 1, 1], args }
}

fn by_tma(spec: &Spec, tile: Tile) -> bool {
    epilogue::by_tma(&spec.product) && tile.bn >= 64
}

/// The kernel of a spec.
pub(super) fn kernel(spec: Spec, tile: Tile) -> Kernel {
    let name = format!("fp8_gemm_wgmma_{}_{}", spec.name(), tile.name());
    let emit = {
        let name = name.clone();
        move || emit(&name, &spec, tile)
    };
    let shared_bytes = tile.barriers(spec.tiled) + 16 * tile.stages;
    Kernel {
        name,
        arch: Arch::Sm90a,
        block: tile.consumer_threads() + 128,
        shared_bytes,
        any_grid: false,
        emit: Box::new(emit),
    }
}

/// What producer and consumers have in common.
struct Block<'a> {
    spec: &'a Spec,
    tile: Tile,
    params: Params,
    /// Maps of scales; B's are an address if it has blocks.
    scale_a: Reg<B64>,
    scale_b: Reg<B64>,
    tid: Reg<B32>,
    warp: Reg<B32>,
    lane: Reg<B32>,
    /// Which block of its cluster this is.
    rank: Option<Reg<B32>>,
    /// Number of the first tile (or pair of tiles), and from one to the next.
    first: Reg<B32>,
    step: Reg<B32>,
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

    /// Rows that a cluster has of a tile.
    fn rows(&self) -> u32 {
        self.tile.bm * self.tile.blocks
    }

    /// From the cluster's first row to the block's.
    fn to_own_rows(&self, k: &mut Assembler, m0: Reg<B32>) {
        if let Some(rank) = self.rank {
            ptx!(k, "mad.lo.u32 {m0}, {rank}, {}, {m0};", self.tile.bm);
        }
    }
}

fn emit(name: &str, spec: &Spec, tile: Tile) -> String {
    let threads = tile.consumer_threads();
    let mut kernel = Assembler::new(name);
    let k = &mut kernel;
    let shared = k.dynamic_shared(1024, "shared");
    k.directive(format!(".maxntid {}, 1, 1", threads + 128));
    k.directive(".minnctapersm 1");
    if tile.blocks > 1 {
        k.directive(".explicitcluster");
        k.directive(format!(".reqnctapercluster {}, 1, 1", tile.blocks));
    }
    let params = Params::declare(k, &spec.product, Assembler::tensor_map);
    let scale_a = k.tensor_map("scale_a");
    let scale_b = if spec.tiled { k.tensor_map("scale_b") } else { k.pointer("scale_b") };
    let c_map = by_tma(spec, tile).then(|| k.tensor_map("c_map"));
    let [tid, warp, lane, base, barriers, first, step] = [(); 7].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {tid}, %tid.x;");
    ptx!(k, "shr.u32 {warp}, {tid}, 5;");
    ptx!(k, "shfl.sync.idx.b32 {warp}, {warp}, 0, 31, 0xffffffff;");
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "mov.u32 {base}, {shared};");
    ptx!(k, "add.u32 {barriers}, {base}, {};", tile.barriers(spec.tiled));
    let (number, count) = if tile.blocks > 1 { ("%clusterid.x", "%nclusterid.x") } else { ("%ctaid.x", "%nctaid.x") };
    ptx!(k, "mov.u32 {first}, {number};");
    ptx!(k, "mov.u32 {step}, {count};");
    let rank = (tile.blocks > 1).then(|| k.reg::<B32>());
    if let Some(rank) = rank {
        ptx!(k, "mov.u32 {rank}, %cluster_ctarank;");
    }
    let (q, ready, consume) = (k.reg::<Pred>(), k.label("READY"), k.label("CONSUME"));
    let end = k.label("END");
    let block = Block { spec, tile, params, scale_a, scale_b, tid, warp, lane, rank, first, step, base, barriers, end };
    ptx!(k, "setp.ne.u32 {q}, {tid}, 0;");
    ptx!(k, "@{q} bra {ready};");
    for stage in 0..tile.stages {
        ptx!(k, "mbarrier.init.shared::cta.b64 [{barriers}+{}], 1;", 8 * stage);
        let arrivals = threads / 32 * tile.blocks;
        ptx!(k, "mbarrier.init.shared::cta.b64 [{barriers}+{}], {arrivals};", 8 * stage + block.to_empty());
    }
    let maps = [Some(block.params.a), Some(block.params.b), Some(scale_a), spec.tiled.then_some(scale_b), c_map];
    for map in maps.into_iter().flatten() {
        ptx!(k, "prefetch.tensormap [{map}];");
    }
    ptx!(k, "fence.mbarrier_init.release.cluster;");
    k.place(&ready);
    if tile.blocks > 1 {
        meet(k);
    } else {
        ptx!(k, "bar.sync 0;");
    }
    ptx!(k, "setp.lt.u32 {q}, {warp}, {};", threads / 32);
    ptx!(k, "@{q} bra {consume};");
    ptx!(k, "setmaxnreg.dec.sync.aligned.u32 40;");
    producer::emit(k, &block);
    k.place(&consume);
    ptx!(k, "setmaxnreg.inc.sync.aligned.u32 232;");
    consumer::emit(k, &block, c_map);
    if tile.blocks > 1 {
        meet(k);
    }
    k.place(&block.end);
    ptx!(k, "ret;");
    kernel.finish(VERSION, Arch::Sm90a.target())
}

/// A barrier of all threads of the cluster that have not ended.
fn meet(k: &mut Assembler) {
    ptx!(k, "barrier.cluster.arrive.release.aligned;");
    ptx!(k, "barrier.cluster.wait.acquire.aligned;");
}

/// The number of tiles of k in `inner` elements.
fn tiles_of_k(k: &mut Assembler, inner: impl std::fmt::Display) -> Reg<B32> {
    let tiles = k.reg::<B32>();
    ptx!(k, "add.u32 {tiles}, {inner}, {};", BK - 1);
    ptx!(k, "shr.u32 {tiles}, {tiles}, {};", BK.trailing_zeros());
    tiles
}
