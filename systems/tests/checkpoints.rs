//! A checkpoint says nothing of the ranks that wrote it: what any layout saved, any other goes on from, with the same loss in the next
//! step and the same optimizer's state, to the bit. What is not all there, or of something else, is refused by name.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bevy_ecs::prelude::*;
use engine::{checkpoint, prelude::*, tensor_pieces::TensorPieces};
use kernels::comm::Comm;
use systems::{
    api::Progress,
    distribute::Distribution,
    hf::read::HfFolder,
    local::{self, Outcome, Silent},
    ranks::Ranks,
    restore::restore,
    saving::{self, Saving},
    scene::{Loaded, Scene},
    session::SessionError,
    setup::{Prepared, prepare, set_up_rank},
    train::Training,
    work::{Work, turn_of},
};

/// pp, ep, dp, and how the five layers lie on the stages. Layers are uneven wherever there is a pipeline, and the eight experts on three
/// ranks.
const LAYOUTS: [(u32, u32, u32, &str); 12] = [
    (1, 1, 1, "()"),
    (2, 1, 1, "(stages: Some([4, 1]))"),
    (4, 1, 1, "(schedule: OneFOneB)"),
    (1, 2, 1, "()"),
    (1, 4, 1, "()"),
    (1, 1, 2, "()"),
    (1, 2, 2, "()"),
    (2, 2, 1, "(schedule: DualPipe)"),
    (2, 1, 2, "(schedule: Interleaved(chunks: 2))"),
    (2, 2, 2, "(schedule: ZbH1, stages: Some([2, 3]))"),
    (1, 3, 1, "()"),
    (2, 3, 1, "(schedule: DualPipe)"),
];

/// The tiny scene on some ranks.
struct Case {
    loaded: Loaded,
    prepared: Arc<Prepared>,
}

impl Case {
    fn new((pp, ep, dp, pipeline): (u32, u32, u32, &str), sets: &[&str], prepared: Option<&Case>) -> Self {
        let mut all = vec![
            format!("telemetry.dir={:?}", std::env::temp_dir().join("hadal-tests").to_str().unwrap()),
            format!("mesh=(pp: {pp}, ep: {ep}, dp: {dp})"),
            format!("pipeline={pipeline}"),
        ];
        let small = [
            "model.num_hidden_layers=5",
            "batch=(microbatch_sequences: 1, num_microbatches: 12)",
            "data.seq_len=32",
            "schedule=Constant(lr: 3e-3)",
            "eval=None",
            "sample=None",
        ];
        all.extend(small.iter().chain(sets).map(|set| (*set).to_owned()));
        let scene = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenes/tiny.ron");
        let loaded = Scene::load(&scene, &all).unwrap();
        let prepared = match prepared {
            Some(case) => case.prepared.clone(),
            None => Arc::new(prepare(&loaded, true).unwrap()),
        };
        Case { loaded, prepared }
    }

    /// Runs `body` on all ranks, each with an app that has checkpoints in the folder that `dir` gives it.
    fn on_ranks<T: Send>(
        &self,
        dir: impl Fn(u32) -> PathBuf + Sync,
        body: impl Fn(&mut App) -> Result<T> + Sync,
    ) -> Vec<Outcome<T>> {
        let distribution = Distribution::new(&self.loaded.scene, &self.prepared.config).unwrap();
        let is_solo = distribution.mesh.num_ranks() == 1;
        let ranks = if is_solo { vec![distribution.ranks(Comm::solo())] } else { distribution.local() };
        local::run_ranks(ranks, |ranks: Ranks| {
            let dir = dir(ranks.layout.rank);
            let silent: Arc<dyn Progress> = Arc::new(Silent);
            let mut app = set_up_rank(&self.loaded, &self.prepared, ranks, Some(1), &silent)?;
            let about = (self.prepared.tokenizer.clone(), "()".to_owned());
            let saving = Saving::new(app.world(), &dir, None, about, None);
            app.insert_resource(saving).insert_resource(StopAt(0)).add_systems(
                Step,
                (saving::advance.run_if(turn_of(Work::Train)), stop).chain().in_set(StepSystems::Keep),
            );
            let done = body(&mut app).map_err(SessionError::runtime)?;
            Ok((done, ExitReason::Finished))
        })
    }
}

/// Training ends after this step.
#[derive(Resource)]
struct StopAt(u64);

fn stop(training: Res<Training>, at: Res<StopAt>, mut exit: ResMut<Exit>) {
    if training.step >= at.0 {
        exit.stop(ExitReason::Finished);
    }
}

/// Trains until `step`; the bits of the last step's loss.
fn train(app: &mut App, step: u64) -> Result<u64> {
    app.insert_resource(StopAt(step)).insert_resource(Work::Train).insert_resource(Exit::default());
    match engine::app::run(app) {
        ExitReason::Finished => {}
        reason => return Err(reason.into()),
    }
    let training = app.world().resource::<Training>();
    assert_eq!(training.step, step);
    Ok(training.last.as_ref().unwrap().loss_nats_per_token.to_bits())
}

/// Begins where `from` ends, or trains two steps; saves into `dir`, trains the third step beside that, and returns its loss.
fn third_step(case: &Case, from: Option<&Path>, dir: &Path) -> u64 {
    let outcomes = case.on_ranks(
        |_| dir.to_owned(),
        |app| {
            match from {
                Some(from) => restore(app.world_mut(), from)?,
                None => train(app, 2).map(drop)?,
            }
            saving::begin(app.world_mut())?;
            let loss = train(app, 3)?;
            saving::finish(app.world_mut())?;
            Ok(loss)
        },
    );
    let losses: Vec<u64> = outcomes.into_iter().map(|outcome| outcome.expect("a rank panicked").unwrap().0).collect();
    assert!(losses.iter().all(|loss| *loss == losses[0]), "ranks agree");
    losses[0]
}

/// The bits of every tensor of a checkpoint, whatever files it is in, and where the run was.
fn contents(folder: &Path) -> (BTreeMap<String, Vec<u64>>, serde_json::Value) {
    let hf = HfFolder::open(folder).unwrap();
    let specs = hf.model().unwrap().specs;
    let bits = |values: Vec<f32>| values.into_iter().map(|x| u64::from(x.to_bits())).collect::<Vec<_>>();
    let mut all: BTreeMap<_, _> =
        specs.iter().map(|spec| (spec.name.clone(), bits(hf.read_param(spec).unwrap()))).collect();
    let pieces = TensorPieces::open(&folder.join("train"), "optimizer").unwrap();
    for name in pieces.names() {
        let spec = specs.iter().find(|spec| name.rsplit_once('.').unwrap().0 == spec.name).unwrap();
        let range = 0..spec.num_elements();
        let values = match pieces.dtype(name).unwrap() {
            safetensors::Dtype::F64 => pieces.read::<f64>(name, range).unwrap().into_iter().map(f64::to_bits).collect(),
            safetensors::Dtype::BF16 => {
                pieces.read::<half::bf16>(name, range).unwrap().into_iter().map(|x| u64::from(x.to_bits())).collect()
            }
            _ => bits(pieces.read::<f32>(name, range).unwrap()),
        };
        all.insert(name.to_owned(), values);
    }
    let state = fs::read_to_string(folder.join("train/state.json")).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&state).unwrap();
    state["train_secs"].take();
    (all, state)
}

fn every_pair(layouts: &[(u32, u32, u32, &str)], sets: &[&str]) {
    let mut cases: Vec<Case> = Vec::new();
    for &layout in layouts {
        let case = Case::new(layout, sets, cases.first());
        cases.push(case);
    }
    for (case, layout) in cases.iter().zip(layouts) {
        let dir = tempfile::tempdir().unwrap();
        let loss = third_step(case, None, dir.path());
        let saved = dir.path().join("latest");
        let found = checkpoint::latest_valid(dir.path()).unwrap();
        assert_eq!((found.step, found.skipped.len()), (2, 0));
        let expected = contents(&saved);
        for (other, other_layout) in cases.iter().zip(layouts) {
            let what = format!("{sets:?}: saved under {layout:?}, loaded under {other_layout:?}");
            let again = tempfile::tempdir().unwrap();
            assert_eq!(third_step(other, Some(&saved), again.path()), loss, "{what}: the next step's loss");
            let found = contents(&again.path().join("latest"));
            assert_eq!(found.1, expected.1, "{what}: where the run was");
            assert!(found.0.keys().eq(expected.0.keys()), "{what}: the same tensors");
            for (name, values) in &expected.0 {
                assert!(found.0[name] == *values, "{what}: `{name}`");
            }
        }
    }
}

#[test]
fn every_layout_goes_on_from_every_other() {
    every_pair(&LAYOUTS, &[]);
}

#[test]
fn so_it_is_in_other_formats_and_under_muon() {
    let layouts = [LAYOUTS[0], LAYOUTS[6], LAYOUTS[7], LAYOUTS[11]];
    for set in ["precision.compute=F64", "precision=(compute: Bf16, moments: Bf16)", "optimizer=Muon()"] {
        every_pair(&layouts, &[set]);
    }
}

/// What a rank that fails says, and what the others say.
fn failures<T>(outcomes: Vec<Outcome<T>>) -> Vec<String> {
    let message =
        |outcome: Outcome<T>| outcome.expect("a rank panicked").err().map_or(String::new(), |e| e.to_string());
    outcomes.into_iter().map(message).collect()
}

#[test]
fn a_rank_whose_disk_fails_leaves_the_checkpoint_before() {
    let case = Case::new(LAYOUTS[6], &[], None);
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    third_step(&case, None, dir.path());
    for culprit in 0..4 {
        let has_failed = Mutex::new(false);
        let outcomes = case.on_ranks(
            // No folder is made there for a rank that is not the first, and none can be for the first.
            |rank| if rank == culprit { elsewhere.path().join("missing\0") } else { dir.path().to_owned() },
            |app| {
                restore(app.world_mut(), &dir.path().join("latest"))?;
                train(app, 3)?;
                saving::begin(app.world_mut())?;
                let saved = saving::finish(app.world_mut());
                *has_failed.lock().unwrap() |= saved.is_err();
                saved
            },
        );
        let said = failures(outcomes);
        assert!(said[culprit as usize].starts_with("cannot "), "{said:?}");
        let others = (0..).zip(&said).filter(|(rank, _)| *rank != culprit);
        assert!(others.into_iter().all(|(_, said)| said.contains(&format!("rank {culprit}"))), "{said:?}");
        let found = checkpoint::latest_valid(dir.path()).unwrap();
        assert_eq!((found.step, found.skipped.len()), (2, 0), "{said:?}");
        assert_eq!(fs::read_link(dir.path().join("latest")).unwrap(), Path::new("checkpoints/step-0000002"));
    }
}

/// Writes a file of tensors anew without those that `leaves_out` says.
fn rewrite(path: &Path, leaves_out: impl Fn(&str) -> bool) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.tensors().into_iter().filter(|(name, _)| !leaves_out(name));
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    fs::write(path, safetensors::serialize(kept, header.metadata().clone()).unwrap()).unwrap();
}

#[test]
fn what_is_missing_or_of_something_else_is_named() {
    let case = Case::new(LAYOUTS[3], &[], None);
    let dir = tempfile::tempdir().unwrap();
    third_step(&case, None, dir.path());
    let saved = dir.path().join("checkpoints/step-0000002");
    let model = saved.join("model-00002-of-00002.safetensors");
    let expert = "model.layers.2.mlp.experts.5.up_proj.weight";
    let index = saved.join("model.safetensors.index.json");
    let optimizer = saved.join("train/optimizer-00002-of-00002.safetensors");
    let solo = Case::new(LAYOUTS[0], &[], Some(&case));
    let refused = |case: &Case| {
        let said = failures(case.on_ranks(|_| dir.path().to_owned(), |app| Ok(restore(app.world_mut(), &saved)?)));
        said.into_iter().next().unwrap()
    };
    for (sets, words) in [
        (&["model.num_hidden_layers=4"][..], "of another model: expected "),
        (&["optimizer=Muon()"], "momentum`: expected "),
        (&["precision.compute=Bf16"], "master`: expected "),
        (&["seed=2"], "saved with seed = 1, but this run has seed = 2"),
    ] {
        let said = refused(&Case::new(LAYOUTS[0], sets, None));
        assert!(said.contains(words), "{sets:?}: {said}");
    }
    let before: Vec<Vec<u8>> = [&model, &index, &optimizer].map(|path| fs::read(path).unwrap()).into();
    let put_back =
        || [&model, &index, &optimizer].iter().zip(&before).for_each(|(path, bytes)| fs::write(path, bytes).unwrap());

    fs::remove_file(&optimizer).unwrap();
    let said = refused(&solo);
    assert!(
        said.contains("`model.embed_tokens.weight.m`: expected") && said.contains("(rows 256..512) in no file"),
        "{said}"
    );
    put_back();

    rewrite(&optimizer, |name| name.starts_with("model.layers.2.mlp.experts.down_proj.v@"));
    let said = refused(&solo);
    assert!(said.contains("`model.layers.2.mlp.experts.down_proj.v`") && said.contains("rows 4..8"), "{said}");
    put_back();

    rewrite(&model, |name| name == expert);
    let text = fs::read_to_string(&index).unwrap();
    let text: Vec<&str> = text.lines().filter(|line| !line.contains(expert)).collect();
    fs::write(&index, text.join("\n")).unwrap();
    let said = refused(&solo);
    assert!(said.contains(expert) && said.contains("missing"), "{said}");
    put_back();
    assert_eq!(refused(&solo), "");
}

#[test]
fn ranks_that_see_other_checkpoints_say_so() {
    let case = Case::new(LAYOUTS[3], &[], None);
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    third_step(&case, None, dir.path());
    let find = |other: &Path| {
        let outcomes = case.on_ranks(
            |rank| if rank == 0 { dir.path() } else { other }.to_owned(),
            |app| {
                let ranks = app.world().resource::<Ranks>().clone();
                let here = if ranks.is_first() { dir.path() } else { other };
                Ok(saving::latest_valid(&ranks, here)?.step)
            },
        );
        outcomes
            .into_iter()
            .map(|outcome| outcome.expect("a rank panicked").map(|(step, _)| step).map_err(|e| e.to_string()))
            .collect::<Vec<_>>()
    };
    assert_eq!(find(dir.path()), [Ok(2), Ok(2)]);
    let said = find(elsewhere.path());
    assert!(
        said.iter().all(|said| said.as_ref().is_err_and(|e| e.contains("a file system that all ranks share"))),
        "{said:?}"
    );
    // Whoever reads the damaged file, all know, and do not begin anew.
    let file = dir.path().join("latest/train/optimizer-00002-of-00002.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 4;
    fs::write(&file, bytes).unwrap();
    let said = find(dir.path());
    let names = |said: &Result<u64, String>| {
        said.as_ref()
            .is_err_and(|e| e.contains("none of the 1 checkpoints") && e.contains("00002.safetensors is damaged"))
    };
    assert!(said.iter().all(names), "{said:?}");
}
