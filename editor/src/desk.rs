//! What lies before the views: the sources with their histories, the one cursor, the scene, and what is asked of the runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use engine::telemetry::Snapshot;
use serde_json::{Value, json};

use crate::{
    background::Background,
    document::Document,
    history::{Cursor, History},
    source::{Source, SourceEvent, Wake},
    theme::ColorBy,
    workbench::{Opened, Workbench},
};

/// Replies that nobody fetched and that are kept.
const MAX_REPLIES: usize = 256;

/// Whether there is a run at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Not known yet.
    Connecting,
    /// Yes.
    Connected,
    /// It was lost, and why; what it told stays, and the source tries again.
    Lost(String),
    /// All was received, and why no more comes.
    Ended(String),
}

/// A source with what it told.
pub struct Track {
    /// Where from.
    pub source: Box<dyn Source>,
    /// Steps and curves.
    pub history: History,
    /// State of the connection.
    pub link: Link,
    /// Steps that were left out because this end was slow.
    pub num_dropped: u64,
}

/// What the selected thing in the routing view is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selected {
    /// Layer, by its number in the model.
    pub layer: u32,
    /// Expert of the layer.
    pub expert: usize,
}

/// All that views look at.
pub struct Desk {
    /// The sources: the first is what is looked at, the second what it is compared with.
    pub tracks: Vec<Track>,
    /// The step and the rank that are looked at.
    pub cursor: Cursor,
    /// The expert that is looked at.
    pub selected: Option<Selected>,
    /// The scene, if one is open.
    pub document: Option<Document>,
    /// Scenes and plans.
    pub workbench: Arc<dyn Workbench>,
    /// Wakes the window.
    pub wake: Wake,
    /// What tasks' colours say.
    pub color_by: ColorBy,
    /// What was last done or went wrong, for the status bar.
    pub message: String,
    /// Whether the message is of an error.
    pub message_is_error: bool,
    /// Files and addresses that were opened, newest first.
    pub recent: Vec<String>,
    /// What to open when nothing is being opened: the first is looked at, others are compared with it.
    pub startup: std::collections::VecDeque<String>,
    /// Whether the scene that is opened first is run at once.
    pub runs_at_startup: bool,
    /// What could not be opened or started, and why: of use to whoever waits for it and is not before the window.
    pub failures: Vec<String>,
    num_opened: usize,
    /// Ranks of a step, as they were found.
    known_ranks: Option<(Arc<Snapshot>, Vec<u32>)>,
    /// What the run said of its state: running, paused, finished.
    pub run_state: Option<String>,
    status_call: Option<u64>,
    replies: BTreeMap<u64, Result<Value, String>>,
    opening: Background<(String, bool, Result<Opened, String>)>,
    starting: Background<Result<Box<dyn Source>, String>>,
}

impl Desk {
    /// An empty one.
    pub fn new(workbench: Arc<dyn Workbench>, wake: Wake) -> Self {
        Desk {
            tracks: Vec::new(),
            cursor: Cursor::default(),
            selected: None,
            document: None,
            workbench,
            wake,
            color_by: ColorBy::default(),
            message: "open a scene, a trace, a run's folder or an address".into(),
            message_is_error: false,
            recent: Vec::new(),
            startup: std::collections::VecDeque::new(),
            runs_at_startup: false,
            failures: Vec::new(),
            num_opened: 0,
            known_ranks: None,
            run_state: None,
            status_call: None,
            replies: BTreeMap::new(),
            opening: Background::default(),
            starting: Background::default(),
        }
    }

    /// Says something in the status bar.
    pub fn say(&mut self, message: impl Into<String>) {
        (self.message, self.message_is_error) = (message.into(), false);
    }

    /// Says what went wrong in the status bar.
    pub fn complain(&mut self, message: impl Into<String>) {
        (self.message, self.message_is_error) = (message.into(), true);
    }

    /// The same, and remembers it.
    fn fail(&mut self, message: String) {
        self.failures.push(message.clone());
        self.complain(message);
    }

    /// Whether something is being opened or started, or will be.
    pub fn is_opening(&self) -> bool {
        self.opening.is_busy() || self.starting.is_busy() || !self.startup.is_empty()
    }

    /// Opens a scene, a trace, a folder or an address, on a thread; `beside` compares it with what is open.
    pub fn open(&mut self, target: &str, beside: bool) {
        if self.opening.is_busy() {
            self.complain("something is being opened already");
            return;
        }
        self.say(format!("opening {target}"));
        let (workbench, wake, name) = (self.workbench.clone(), self.wake.clone(), target.to_owned());
        let started = self.opening.start("open", self.wake.clone(), move || {
            let opened = workbench.open(&name, wake);
            (name, beside, opened)
        });
        if let Err(error) = started {
            self.complain(format!("the system gives no thread: {error}"));
        }
    }

    /// Shows a source: instead of what is shown, or `beside` it.
    pub fn attach(&mut self, source: Box<dyn Source>, beside: bool) {
        let begins_at = source.begins_at();
        let track = Track { source, history: History::default(), link: Link::Connecting, num_dropped: 0 };
        if beside && !self.tracks.is_empty() {
            self.tracks.truncate(1);
        } else {
            self.tracks.clear();
            (self.run_state, self.status_call) = (None, None);
            self.cursor = Cursor { step: begins_at, rank: None };
            self.selected = None;
        }
        self.tracks.push(track);
    }

    /// Starts the open scene in this process.
    pub fn run(&mut self, resume: bool) {
        let Some(document) = &self.document else {
            self.complain("there is no scene to run: open one");
            return;
        };
        if self.starting.is_busy() {
            self.complain("a run is being started already");
            return;
        }
        let (workbench, path, text) = (self.workbench.clone(), document.path.clone(), document.text.clone());
        let wake = self.wake.clone();
        self.message = if resume { "going on from the last checkpoint".into() } else { "starting".into() };
        self.message_is_error = false;
        let started = self
            .starting
            .start("start of a run", self.wake.clone(), move || workbench.run(path.as_deref(), &text, resume, wake));
        if let Err(error) = started {
            self.complain(format!("the system gives no thread: {error}"));
        }
    }

    /// Takes what came since the last frame. Gives whether anything changed.
    pub fn work(&mut self) -> bool {
        let mut changed = false;
        if !self.opening.is_busy()
            && let Some(target) = self.startup.pop_front()
        {
            self.open(&target, self.num_opened > 0);
            self.num_opened += 1;
        }
        if let Some((target, beside, opened)) = self.opening.poll() {
            changed = true;
            match opened {
                Ok(Opened::Source(source)) => {
                    self.say(format!("opened {}", source.name()));
                    self.remember(&target);
                    self.attach(source, beside);
                }
                Ok(Opened::Scene { path, text }) => {
                    self.say(format!("opened {}", path.display()));
                    self.remember(&target);
                    self.open_scene(Some(path), text);
                    if std::mem::take(&mut self.runs_at_startup) {
                        self.run(false);
                    }
                }
                Err(error) => self.fail(error),
            }
        }
        if let Some(result) = self.starting.poll() {
            changed = true;
            match result {
                Ok(source) => {
                    self.say(format!("running {}", source.name()));
                    self.attach(source, false);
                }
                Err(error) => self.fail(error),
            }
        }
        let mut asks_status = false;
        for (i, track) in self.tracks.iter_mut().enumerate() {
            for event in track.source.poll() {
                changed = true;
                match event {
                    SourceEvent::Connected(_) => {
                        track.link = Link::Connected;
                        asks_status |= i == 0;
                    }
                    SourceEvent::Lost(why) => track.link = Link::Lost(why),
                    SourceEvent::Ended(why) => track.link = Link::Ended(why),
                    SourceEvent::Snapshot(snapshot) => track.history.push(snapshot),
                    SourceEvent::Dropped(count) => track.num_dropped = count,
                    SourceEvent::Reply { id, result } => {
                        self.replies.insert(id, result);
                        while self.replies.len() > MAX_REPLIES {
                            self.replies.pop_first();
                        }
                    }
                }
            }
        }
        if let Some(Ok(status)) = self.status_call.and_then(|id| self.replies.remove(&id)) {
            self.status_call = None;
            self.run_state = status.get("state").and_then(Value::as_str).map(str::to_owned);
        }
        if asks_status {
            self.ask_status();
        }
        if let Some(document) = &mut self.document {
            document.work(&self.workbench, &self.wake);
        }
        changed
    }

    /// Edits a scene.
    pub fn open_scene(&mut self, path: Option<PathBuf>, text: String) {
        self.document = Some(Document::new(path, text));
    }

    fn remember(&mut self, target: &str) {
        self.recent.retain(|known| known != target);
        self.recent.insert(0, target.to_owned());
        self.recent.truncate(10);
    }

    /// What is looked at.
    pub fn main(&self) -> Option<&Track> {
        self.tracks.first()
    }

    /// The step under the cursor.
    pub fn now(&self) -> Option<&Arc<Snapshot>> {
        self.main()?.history.at(self.cursor.step)
    }

    /// The newest step up to the cursor that has tasks: a log has figures of steps that no trace has.
    pub fn now_with_spans(&self) -> Option<&Arc<Snapshot>> {
        self.main()?.history.latest(self.cursor.step, |snapshot| !snapshot.spans.is_empty())
    }

    /// Ranks of the step under the cursor; looked for once for a step.
    pub fn ranks(&mut self) -> Vec<u32> {
        let Some(snapshot) = self.now_with_spans().cloned() else { return Vec::new() };
        if let Some((_, ranks)) = self.known_ranks.as_ref().filter(|(of, _)| Arc::ptr_eq(of, &snapshot)) {
            return ranks.clone();
        }
        let ranks: BTreeSet<u32> = snapshot.spans.iter().map(|span| span.rank).collect();
        let ranks: Vec<u32> = ranks.into_iter().collect();
        self.known_ranks = Some((snapshot, ranks.clone()));
        ranks
    }

    /// Moves the cursor by so many kept steps; beyond the newest it follows.
    pub fn move_step(&mut self, by: i64) {
        let Some(history) = self.main().map(|track| &track.history) else { return };
        let Some((_, last)) = history.range() else { return };
        let at = history.at(self.cursor.step).map_or(last, |snapshot| snapshot.step);
        let to = history.neighbor(at, by);
        self.cursor.step = if by > 0 && at == last { None } else { to };
    }

    /// Sends a command to the run that is looked at. None, with a word in the status bar, if there is nobody to ask.
    pub fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        let id = self.tracks.first_mut().and_then(|track| track.source.call(method, params));
        if id.is_none() {
            self.complain(format!("there is no run to ask for {method}"));
        }
        id
    }

    /// The same without parameters, for buttons. What became of the run is asked for after it.
    pub fn command(&mut self, method: &str) {
        if self.call(method, json!({})).is_some() {
            self.say(format!("asked for {method}"));
            self.ask_status();
        }
    }

    fn ask_status(&mut self) {
        let track = self.tracks.first_mut();
        self.status_call = track.and_then(|track| track.source.call("run.status", json!({})));
    }

    /// Whether the run waits between two steps.
    pub fn is_paused(&self) -> bool {
        self.run_state.as_deref() == Some("paused")
    }

    /// The reply to a call, once.
    pub fn take_reply(&mut self, id: u64) -> Option<Result<Value, String>> {
        self.replies.remove(&id)
    }

    /// Whether somebody answers calls now.
    pub fn is_live(&self) -> bool {
        self.main().is_some_and(|track| track.link == Link::Connected)
    }
}
