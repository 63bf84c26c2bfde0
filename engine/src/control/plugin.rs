//! How requests reach a world: in `Update`, between two steps, on every rank.
//!
//! The first rank is asked. What concerns all ranks it hands to the others before it does its own part, and before each step it
//! tells them to go on; so a rank that waits is a rank whose first is paused, and a change is in force from the same step on
//! everywhere. A signal that any rank has seen stops all of them before the same step, or within it: see [`super::gate`].

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use kernels::comm::Comm;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Inbox, Reply, Request, RpcError, RpcResult,
    gather::{self, Fetch, Gather},
    methods::{self, Access, METHODS, Method, Methods, RUN_STEP},
    values::LiveValues,
};
use crate::{
    app::{Exit, ExitReason},
    step::StepIndex,
    telemetry::{Detail, Telemetry},
};

/// How often a paused run looks whether it was told to stop.
const PAUSE_TICK: Duration = Duration::from_millis(20);
/// Requests that are answered between two steps of a run that is not paused; more wait for the next time.
const MAX_BETWEEN_STEPS: usize = 64;

/// When requests are handled: before the step, so that what they change is in force in it.
#[derive(SystemSet, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ControlSystems;

/// Lets a run be asked, paused and stopped.
pub struct ControlPlugin {
    /// What the run is called.
    pub name: String,
    /// The way to the other ranks.
    pub comm: Comm,
    /// Where requests come in, on the first rank.
    pub inbox: Option<Inbox>,
    /// Whether the feeds of the other ranks are others, as they are in other processes: what they tell is then fetched by the first.
    pub feeds_are_apart: bool,
    /// Number of the signal that asked to stop; 0 for none.
    pub signal: Arc<AtomicUsize>,
    /// How long a signal waits for the end of the step at hand, which is given up then.
    pub finish_step: Duration,
    /// Is told in words what was changed from outside.
    pub note: Note,
}

/// Takes a line for whoever reads along.
pub type Note = Arc<dyn Fn(&str) + Send + Sync>;

impl Plugin for ControlPlugin {
    fn build(&self, app: &mut App) {
        let world = app.world_mut();
        world.get_resource_or_init::<LiveValues>();
        world.get_resource_or_init::<Methods>().0.extend(METHODS);
        if let Some(inbox) = &self.inbox {
            let rank = if self.feeds_are_apart { 0 } else { self.comm.rank() as usize };
            world.get_resource_or_init::<Telemetry>().attach(inbox.feed().clone(), rank);
        }
        app.insert_resource(Control {
            name: self.name.clone(),
            comm: self.comm.clone(),
            inbox: self.inbox.clone().filter(|_| self.comm.rank() == 0),
            signal: self.signal.clone(),
            finish_step: self.finish_step,
            has_passed_gate: false,
            note: self.note.clone(),
            paused: false,
            goes_on: true,
            stepping: VecDeque::new(),
            num_told: 0,
            gather: Gather::default(),
            feeds_are_apart: self.feeds_are_apart && self.comm.num_ranks() > 1,
        })
        .add_systems(Update, handle.in_set(ControlSystems));
    }
}

/// How a run is controlled.
#[derive(Resource)]
pub struct Control {
    name: String,
    pub(super) comm: Comm,
    inbox: Option<Inbox>,
    pub(super) signal: Arc<AtomicUsize>,
    pub(super) finish_step: Duration,
    /// Whether a step was finished.
    pub(super) has_passed_gate: bool,
    pub(super) note: Note,
    paused: bool,
    goes_on: bool,
    /// Steps to be done although the run is paused: who waits for the end of each.
    stepping: VecDeque<Reply>,
    /// Steps that listeners were told of: what the engine does in between counts for none.
    num_told: u64,
    pub(super) gather: Gather,
    feeds_are_apart: bool,
}

impl Control {
    /// Whether the step that follows is to be done.
    pub fn goes_on(&self) -> bool {
        self.goes_on
    }

    pub(super) fn pause(&mut self) {
        self.paused = true;
    }

    /// The run goes on, as if a request had said so.
    pub fn resume(&mut self) {
        self.paused = false;
    }

    fn holds(&self) -> bool {
        self.paused && self.stepping.is_empty()
    }

    /// What listeners get of the step that begins.
    fn detail(&self) -> Detail {
        let num_listeners = || self.inbox.as_ref().map_or(0, |inbox| inbox.feed().listeners().0);
        if self.feeds_are_apart { self.gather.detail(num_listeners()) } else { Detail::Whole }
    }

    pub(super) fn status(&self, world: &World) -> Map<String, Value> {
        let (num_listeners, num_dropped) = self.inbox.as_ref().map_or((0, 0), |inbox| inbox.feed().listeners());
        let state = if self.paused { "paused" } else { "running" };
        let step = world.get_resource::<StepIndex>().map_or(0, |index| index.0);
        methods::object([
            ("name", self.name.as_str().into()),
            ("step", step.into()),
            ("state", state.into()),
            ("num_ranks", self.comm.num_ranks().into()),
            ("num_listeners", num_listeners.into()),
            ("num_dropped", num_dropped.into()),
        ])
    }
}

/// What the first rank tells the others between two steps.
#[derive(Serialize, Deserialize)]
enum Order {
    /// The next step begins, and listeners get so much of it.
    Go(Detail),
    /// The first brings together what all tell of the last step.
    Fetch(Fetch),
    /// Every rank does this.
    Call { method: String, params: Value },
    /// One rank does this, and all get its answer.
    Ask { rank: u32, method: String, params: Value },
}

/// What a rank brings to the exchange.
#[derive(Serialize, Deserialize)]
struct Told {
    order: Option<Order>,
    signal: usize,
}

fn handle(world: &mut World) -> Result {
    let control = world.resource::<Control>();
    if control.comm.rank() == 0 { lead(world) } else { follow(world) }
}

fn lead(world: &mut World) -> Result {
    if let Some(fetch) = gather::next(world) {
        exchange(world, Some(Order::Fetch(fetch.clone())))?;
        if world.resource::<Exit>().reason().is_some() {
            return Ok(());
        }
        gather::gather(world, &fetch)?;
    }
    let num_told = world.resource::<Telemetry>().num_told();
    let mut control = world.resource_mut::<Control>();
    if std::mem::replace(&mut control.num_told, num_told) < num_told
        && let Some(reply) = control.stepping.pop_front()
    {
        reply.send(Ok(methods::status(world)));
    }
    let mut num_answered = 0;
    loop {
        let control = world.resource::<Control>();
        let holds = control.holds();
        // Others wait for a run that is paused, and that is no reason to give it up.
        control.comm.watch().touch();
        if control.signal.load(Ordering::Relaxed) != 0 {
            break;
        }
        // A paused run meets nobody, and would not notice.
        if let Some(lost) = control.comm.lost() {
            return Err(lost.into());
        }
        let request = match &control.inbox {
            None => None,
            Some(inbox) if holds => inbox.recv_timeout(PAUSE_TICK),
            Some(_) if num_answered >= MAX_BETWEEN_STEPS => None,
            Some(inbox) => inbox.try_recv(),
        };
        match request {
            Some(request) => answer(world, request)?,
            None if holds => {
                world.resource_mut::<Control>().goes_on = false;
                return Ok(());
            }
            None => break,
        }
        num_answered += 1;
        if world.resource::<Exit>().reason().is_some() {
            return Ok(());
        }
    }
    let detail = world.resource::<Control>().detail();
    exchange(world, Some(Order::Go(detail)))?;
    world.resource_mut::<Telemetry>().set_detail(detail);
    world.resource_mut::<Control>().goes_on = true;
    Ok(())
}

fn answer(world: &mut World, Request { method, params, may_change, reply }: Request) -> Result {
    let method = match methods::find(world, &method) {
        Ok(method) => method,
        Err(error) => {
            reply.send(Err(error));
            return Ok(());
        }
    };
    if !method.access.only_reads() && !may_change {
        let message = format!("`{}` changes the run, which needs its token", method.name);
        reply.send(Err(RpcError::new(RpcError::NO_TOKEN, message)));
        return Ok(());
    }
    if let Err(error) = method.check_params(&params) {
        reply.send(Err(error));
        return Ok(());
    }
    if !method.access.only_reads() {
        let control = world.resource::<Control>();
        let of_what = if params.is_null() { String::new() } else { format!(" {params}") };
        (control.note)(&format!("asked from outside: {}{of_what}", method.name));
    }
    if method.access == Access::ReadsAnyRank {
        reply.send(ask_rank(world, &method, params)?);
        return Ok(());
    }
    if method.name == RUN_STEP {
        let mut control = world.resource_mut::<Control>();
        control.paused = true;
        control.stepping.push_back(reply);
        return Ok(());
    }
    if method.access == Access::ChangesAllRanks {
        let order = Order::Call { method: method.name.to_owned(), params: params.clone() };
        exchange(world, Some(order))?;
        if world.resource::<Exit>().reason().is_some() {
            reply.send(Err(RpcError::over()));
            return Ok(());
        }
    }
    let result = (method.run)(world, &params);
    if let (Err(error), false) = (&result, method.access.only_reads()) {
        (world.resource::<Control>().note)(&format!("{} was refused: {error}", method.name));
    }
    reply.send(result);
    Ok(())
}

/// What `method` comes to on the rank that the parameters name.
fn ask_rank(world: &mut World, method: &Method, mut params: Value) -> Result<RpcResult> {
    let rank = params.as_object_mut().and_then(|params| params.remove("rank")).unwrap_or(0.into());
    let num_ranks = world.resource::<Control>().comm.num_ranks();
    match rank.as_u64().and_then(|rank| u32::try_from(rank).ok()).filter(|&rank| rank < num_ranks) {
        Some(0) => Ok((method.run)(world, &params)),
        Some(rank) => {
            exchange(world, Some(Order::Ask { rank, method: method.name.to_owned(), params }))?;
            if world.resource::<Exit>().reason().is_some() {
                Ok(Err(RpcError::over()))
            } else {
                hear(world, rank, None)
            }
        }
        None => Ok(Err(RpcError::params(format!("expected a `rank` below {num_ranks}, found {rank}")))),
    }
}

/// Brings the answer of `rank` to all.
fn hear(world: &World, rank: u32, mine: Option<RpcResult>) -> Result<RpcResult> {
    let answers = world.resource::<Control>().comm.all_gather_bytes(serde_json::to_vec(&mine)?)?;
    let answer: Option<RpcResult> = serde_json::from_slice(&answers[rank as usize])?;
    Ok(answer.unwrap_or_else(|| Err(RpcError::failed(format!("rank {rank} gave no answer")))))
}

fn follow(world: &mut World) -> Result {
    loop {
        let order = exchange(world, None)?;
        if world.resource::<Exit>().reason().is_some() {
            return Ok(());
        }
        match order {
            Some(Order::Call { method, params }) => {
                // The first rank does the same, and answers.
                if let Ok(method) = methods::find(world, &method) {
                    let _ = (method.run)(world, &params);
                }
                if world.resource::<Exit>().reason().is_some() {
                    return Ok(());
                }
            }
            Some(Order::Ask { rank, method, params }) => {
                let is_mine = world.resource::<Control>().comm.rank() == rank;
                let mine = is_mine.then(|| (methods::find(world, &method)?.run)(world, &params));
                let _for_who_asked = hear(world, rank, mine)?;
            }
            Some(Order::Fetch(fetch)) => gather::gather(world, &fetch)?,
            Some(Order::Go(detail)) => {
                world.resource_mut::<Telemetry>().set_detail(detail);
                return Ok(());
            }
            None => return Ok(()),
        }
    }
}

/// Brings `order` to all ranks, or fetches it. A signal that any of them has seen stops all instead.
fn exchange(world: &mut World, order: Option<Order>) -> Result<Option<Order>> {
    let control = world.resource::<Control>();
    let told = Told { order, signal: control.signal.load(Ordering::Relaxed) };
    let all = if control.comm.num_ranks() == 1 {
        vec![told]
    } else {
        let bytes = control.comm.all_gather_bytes(serde_json::to_vec(&told)?)?;
        bytes.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>()?
    };
    if let Some(signal) = all.iter().map(|told| told.signal).find(|&signal| signal != 0) {
        world.resource_mut::<Exit>().stop(ExitReason::Signal(signal as i32));
    }
    Ok(all.into_iter().next().and_then(|first| first.order))
}
