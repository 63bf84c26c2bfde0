//! How tokens spread over experts, as an input of planning: evenly, by a law, or as a run measured it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use engine::log;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::shuffle::Order;

/// How tokens spread over experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum RoutingLoad {
    /// Each expert gets the same.
    #[default]
    Balanced,
    /// The expert of rank k, from 1, gets a share in proportion to `k^-exponent`; in each layer, who has which rank is drawn anew.
    Zipf {
        /// 0 is balanced; 1 is what is called Zipf's law.
        exponent: f64,
        /// Seed of the draw.
        #[serde(default)]
        seed: u64,
    },
    /// As the caller measured it; each layer's shares are scaled to sum to 1.
    Shares(Vec<Vec<f64>>),
    /// As measured.
    Replay {
        /// A run's `log.jsonl`, or its folder, or JSON as in [`read`].
        path: PathBuf,
        /// First and last step of a log; the last [`LAST_STEPS`] if not given.
        #[serde(default)]
        steps: Option<(u64, u64)>,
    },
}

/// Steps of a log that are averaged if none are named.
pub const LAST_STEPS: usize = 50;

/// There is no load to plan with.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// The file has something else.
    #[error("{}:{line}: expected {expected}, found {found}", path.display())]
    Content {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What it should have.
        expected: String,
        /// What it has.
        found: String,
    },
    /// The exponent is none.
    #[error("expected a Zipf exponent of 0 or more, found {0}")]
    Exponent(f64),
    /// The shares are of another model.
    #[error("expected loads of {expected}, found {found}")]
    Shares {
        /// Layers and experts of the model.
        expected: String,
        /// Layers and experts of the shares.
        found: String,
    },
    /// The load is of another model.
    #[error("{}: expected loads of {expected}, found {found}", path.display())]
    Sizes {
        /// File.
        path: PathBuf,
        /// Layers and experts of the model.
        expected: String,
        /// Layers and experts of the file.
        found: String,
    },
}

impl RoutingLoad {
    /// `[layer][expert]`: the share of a layer's tokens that each expert gets; sums to 1 in each layer.
    ///
    /// # Errors
    /// If the exponent is no number of 0 or more; if the file cannot be read, has no loads, or those of other layers and experts.
    ///
    /// A run's log has `num_mtp` layers more than the decoder, those of modules for multi-token prediction; they are left out.
    pub fn shares(&self, num_layers: usize, num_mtp: usize, num_experts: usize) -> Result<Vec<Vec<f64>>, LoadError> {
        match self {
            RoutingLoad::Balanced => Ok(vec![vec![1.0 / num_experts as f64; num_experts]; num_layers]),
            RoutingLoad::Zipf { exponent, .. } if !(exponent.is_finite() && *exponent >= 0.0) => {
                Err(LoadError::Exponent(*exponent))
            }
            RoutingLoad::Zipf { exponent, seed } => {
                let layer = |layer| {
                    let order = Order::new(*seed, layer as u64, num_experts as u32);
                    let share = |expert| (order.row(expert as u64) as f64 + 1.0).powf(-exponent);
                    normalized((0..num_experts).map(share).collect())
                };
                Ok((0..num_layers).map(layer).collect())
            }
            RoutingLoad::Shares(shares) => {
                let is_model = |layer: &Vec<f64>| layer.len() == num_experts && layer.iter().sum::<f64>() > 0.0;
                // Layers of multi-token prediction may follow those of the model.
                if shares.len() < num_layers || !shares.iter().all(is_model) {
                    return Err(LoadError::Shares {
                        expected: format!("{num_layers} layers with {num_experts} experts"),
                        found: format!("{} with {}", shares.len(), shares.first().map_or(0, Vec::len)),
                    });
                }
                Ok(shares.iter().take(num_layers).cloned().map(normalized).collect())
            }
            RoutingLoad::Replay { path, steps } => {
                let mut measured = read(path, *steps)?;
                if measured.shares.len() == num_layers + num_mtp {
                    measured.shares.truncate(num_layers);
                }
                let sizes = |layers, experts| format!("{layers} layers with {experts} experts");
                let found = (measured.shares.len(), measured.shares.first().map_or(0, Vec::len));
                if found == (num_layers, num_experts) {
                    return Ok(measured.shares);
                }
                let (expected, found) = (sizes(num_layers, num_experts), sizes(found.0, found.1));
                Err(LoadError::Sizes { path: path.clone(), expected, found })
            }
        }
    }
}

/// Loads of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The model's numbers of the layers; counted from 0 if the file has none.
    pub layers: Vec<usize>,
    /// `[layer][expert]`: shares that sum to 1 in each layer.
    pub shares: Vec<Vec<f64>>,
}

/// Reads loads: from a log (`*.jsonl`, or the folder it is in) whose lines have `load/layer N` with the tokens of each expert, of
/// which `steps`, first and last, are added up, or else the last [`LAST_STEPS`]; or from JSON, `{"layers": [[..], ..]}`
/// with counts or shares of each layer's experts.
///
/// # Errors
/// If the file cannot be read, or has no such loads: by file and line, what was expected and what was found.
pub fn read(path: &Path, steps: Option<(u64, u64)>) -> Result<Measured, LoadError> {
    if path.is_dir() {
        read_log(&path.join("log.jsonl"), steps)
    } else if path.extension().is_some_and(|extension| extension == "jsonl") {
        read_log(path, steps)
    } else {
        read_json(path)
    }
}

fn content(path: &Path, line: usize, expected: impl Into<String>, found: impl Into<String>) -> LoadError {
    LoadError::Content { path: path.to_owned(), line, expected: expected.into(), found: found.into() }
}

const KEY: &str = "load/layer ";

fn read_log(path: &Path, steps: Option<(u64, u64)>) -> Result<Measured, LoadError> {
    let lines = log::read(path)?;
    let num_lines = lines.len();
    let is_wanted = |step| steps.is_none_or(|(first, last)| (first..=last).contains(&step));
    let has_loads = |line: &log::Line| line.fields.keys().any(|key| key.starts_with(KEY));
    let mut found: Vec<_> =
        lines.iter().enumerate().filter(|(_, line)| is_wanted(line.step) && has_loads(line)).collect();
    if steps.is_none() {
        found.drain(..found.len().saturating_sub(LAST_STEPS));
    }
    let Some((first, _)) = found.first().copied() else {
        let which = steps.map_or_else(String::new, |(first, last)| format!(" in a step from {first} to {last}"));
        let expected = format!("`{KEY}N` with the tokens of each expert{which}");
        let ends = lines.first().zip(lines.last()).map(|(a, b)| format!("steps {} to {} without", a.step, b.step));
        return Err(content(path, num_lines.max(1), expected, ends.unwrap_or_else(|| "no steps".into())));
    };
    let mut sums: Vec<(usize, Vec<f64>)> = Vec::new();
    for (i, line) in found {
        let loads = line.fields.iter().filter_map(|(key, value)| Some((key, key.strip_prefix(KEY)?, value)));
        let mut layers = Vec::new();
        for (key, number, value) in loads {
            let bad = |expected: &str, found: String| content(path, i + 1, format!("{expected} in `{key}`"), found);
            let layer: usize = number.parse().map_err(|_| bad("the number of a layer", number.to_owned()))?;
            layers.push((layer, counts(value).map_err(|found| bad("a list of counts of 0 or more", found))?));
        }
        layers.sort_by_key(|(layer, _)| *layer);
        let shape = |layers: &[(usize, Vec<f64>)]| layers.iter().map(|(l, c)| (*l, c.len())).collect::<Vec<_>>();
        if i == first {
            sums = layers;
        } else if shape(&layers) == shape(&sums) {
            for (sum, count) in sums.iter_mut().zip(&layers).flat_map(|(sum, layer)| sum.1.iter_mut().zip(&layer.1)) {
                *sum += count;
            }
        } else {
            let expected = format!("the layers and experts of line {}: {}", first + 1, describe(&sums));
            return Err(content(path, i + 1, expected, describe(&layers)));
        }
    }
    for (layer, sum) in &sums {
        if sum.iter().sum::<f64>() <= 0.0 {
            return Err(content(path, first + 1, format!("tokens in `{KEY}{layer}`"), "none in any step read"));
        }
        let num_experts = sums[0].1.len();
        if sum.len() != num_experts {
            let expected = format!("{num_experts} experts in `{KEY}{layer}`, as in `{KEY}{}`", sums[0].0);
            return Err(content(path, first + 1, expected, sum.len().to_string()));
        }
    }
    let (layers, sums): (Vec<usize>, Vec<Vec<f64>>) = sums.into_iter().unzip();
    Ok(Measured { layers, shares: sums.into_iter().map(normalized).collect() })
}

fn describe(layers: &[(usize, Vec<f64>)]) -> String {
    let layer = |(layer, counts): &(usize, Vec<f64>)| format!("{layer} with {}", counts.len());
    layers.iter().map(layer).collect::<Vec<_>>().join(", ")
}

/// Numbers of 0 or more; else what there is instead.
fn counts(value: &Value) -> Result<Vec<f64>, String> {
    let list = value.as_array().ok_or_else(|| value.to_string())?;
    let count = |value: &Value| value.as_f64().filter(|count| *count >= 0.0).ok_or_else(|| value.to_string());
    list.iter().map(count).collect()
}

#[derive(Deserialize)]
struct Document {
    layers: Vec<Vec<Count>>,
}

/// A number of 0 or more: a type, so that the parser can say in which line there is none.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "f64")]
struct Count(f64);

impl TryFrom<f64> for Count {
    type Error = String;

    fn try_from(count: f64) -> Result<Self, String> {
        if count >= 0.0 { Ok(Count(count)) } else { Err(format!("{count}, where counts are 0 or more")) }
    }
}

fn read_json(path: &Path) -> Result<Measured, LoadError> {
    const EXPECTED: &str = "`{\"layers\": [[..], ..]}` with counts or shares of each layer's experts";
    let text = fs::read_to_string(path).map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
    let document: Document =
        serde_json::from_str(&text).map_err(|error| content(path, error.line(), EXPECTED, error.to_string()))?;
    let layers: Vec<Vec<f64>> =
        document.layers.into_iter().map(|layer| layer.into_iter().map(|count| count.0).collect()).collect();
    let num_experts = layers.first().map_or(0, Vec::len);
    if num_experts == 0 {
        return Err(content(path, 1, EXPECTED, "no experts"));
    }
    for (i, layer) in layers.iter().enumerate() {
        let line = line_of_layer(&text, i);
        if layer.len() != num_experts {
            let expected = format!("{num_experts} experts in layers[{i}], as in layers[0]");
            return Err(content(path, line, expected, layer.len().to_string()));
        }
        if layer.iter().sum::<f64>() <= 0.0 {
            return Err(content(path, line, format!("a load in layers[{i}]"), "none"));
        }
    }
    Ok(Measured { layers: (0..layers.len()).collect(), shares: layers.into_iter().map(normalized).collect() })
}

/// The line where a layer's list begins, in a text that has parsed: brackets after the key are those of lists of numbers.
fn line_of_layer(text: &str, layer: usize) -> usize {
    let key = text.find("\"layers\"").unwrap_or(0);
    let begin = text[key..].match_indices('[').nth(layer + 1).map_or(key, |(i, _)| key + i);
    text[..begin].lines().count().max(1)
}

fn normalized(mut loads: Vec<f64>) -> Vec<f64> {
    let total: f64 = loads.iter().sum();
    loads.iter_mut().for_each(|load| *load /= total);
    loads
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn shares_sum_to_one_and_follow_the_law() {
        let check = |load: RoutingLoad, sorted: [f64; 4]| {
            for layer in load.shares(5, 0, 4).unwrap() {
                let mut shares = layer;
                shares.sort_by(|a, b| b.total_cmp(a));
                assert!(shares.iter().zip(sorted).all(|(a, b)| (a - b).abs() < 1e-12), "{shares:?}");
            }
        };
        check(RoutingLoad::Balanced, [0.25; 4]);
        check(RoutingLoad::Zipf { exponent: 0.0, seed: 0 }, [0.25; 4]);
        // 1 + 1/2 + 1/3 + 1/4 = 25/12
        check(RoutingLoad::Zipf { exponent: 1.0, seed: 0 }, [0.48, 0.24, 0.16, 0.12]);
        // 1 + 1/4 + 1/9 + 1/16 = 205/144
        check(RoutingLoad::Zipf { exponent: 2.0, seed: 9 }, [144.0, 36.0, 16.0, 9.0].map(|part| part / 205.0));
    }

    #[test]
    fn measured_shares_are_scaled_and_must_be_of_the_model() {
        let shares = |layers: &[&[f64]]| RoutingLoad::Shares(layers.iter().map(|layer| layer.to_vec()).collect());
        let three = shares(&[&[1.0, 3.0], &[0.5, 0.5], &[0.0, 9.0]]);
        assert_eq!(three.shares(3, 0, 2).unwrap(), [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]);
        assert_eq!(three.shares(2, 1, 2).unwrap(), [[0.25, 0.75], [0.5, 0.5]], "that of a module is left out");
        let check = |load: &RoutingLoad, layers, experts, found: &str| {
            let error = load.shares(layers, 0, experts).unwrap_err().to_string();
            assert_eq!(error, format!("expected loads of {layers} layers with {experts} experts, found {found}"));
        };
        check(&three, 4, 2, "3 with 2");
        check(&three, 3, 4, "3 with 2");
        check(&shares(&[]), 1, 2, "0 with 0");
        check(&shares(&[&[0.0, 0.0]]), 1, 2, "1 with 2");
        check(&shares(&[&[1.0, 1.0], &[1.0]]), 2, 2, "2 with 2");
    }

    #[test]
    fn layers_and_seeds_have_orders_of_their_own() {
        let zipf = |seed| RoutingLoad::Zipf { exponent: 1.0, seed }.shares(2, 0, 64).unwrap();
        assert_eq!(zipf(1), zipf(1));
        assert_ne!(zipf(1), zipf(2));
        assert_ne!(zipf(1)[0], zipf(1)[1]);
    }

    #[test]
    fn exponents_that_are_none_are_refused() {
        for exponent in [-1.0, f64::NAN, f64::INFINITY] {
            let error = RoutingLoad::Zipf { exponent, seed: 0 }.shares(1, 0, 4).unwrap_err().to_string();
            assert_eq!(error, format!("expected a Zipf exponent of 0 or more, found {exponent}"));
        }
    }

    #[test]
    fn a_log_is_averaged_over_its_steps() {
        let lines: String = (1..=100)
            .map(|step| {
                let hot = if step <= 50 { 3 } else { 1 };
                format!("{{\"step\": {step}, \"load/layer 4\": [1, {hot}], \"load/layer 3\": [2, 2], \"lr\": 1.0}}\n")
            })
            .collect();
        let (dir, path) = file("log.jsonl", &lines);
        let check = |path: &Path, steps, second: f64| {
            let measured = read(path, steps).unwrap();
            assert_eq!(measured.layers, [3, 4]);
            assert_eq!(measured.shares[0], [0.5, 0.5]);
            assert!(measured.shares[1].iter().zip([1.0 - second, second]).all(|(a, b)| (a - b).abs() < 1e-12));
        };
        check(&path, Some((1, 10)), 0.75);
        check(&path, Some((50, 51)), 4.0 / 6.0);
        check(&path, None, 0.5);
        check(dir.path(), None, 0.5);
        let replay = RoutingLoad::Replay { path, steps: None };
        assert_eq!(replay.shares(2, 0, 2).unwrap(), [[0.5, 0.5]; 2]);
        assert_eq!(replay.shares(1, 1, 2).unwrap(), [[0.5, 0.5]; 1], "the layer of a module is left out");
        let error = replay.shares(58, 1, 256).unwrap_err().to_string();
        assert!(
            error.ends_with("expected loads of 58 layers with 256 experts, found 2 layers with 2 experts"),
            "{error}"
        );
    }

    #[test]
    fn json_has_counts_or_shares() {
        for text in ["{\"layers\": [[1, 3], [2, 2]]}", "{\"layers\": [[0.25, 0.75], [0.5, 0.5]]}"] {
            let (_dir, path) = file("loads.json", text);
            let measured = read(&path, None).unwrap();
            assert_eq!((measured.layers, measured.shares), (vec![0, 1], vec![vec![0.25, 0.75], vec![0.5, 0.5]]));
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_file_and_line() {
        let check = |name: &str, text: &str, steps, message: &str| {
            let (_dir, path) = file(name, text);
            let error = read(&path, steps).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}{message}", path.display())), "{error}");
        };
        const JSON: &str = "`{\"layers\": [[..], ..]}` with counts or shares of each layer's experts";
        let json = |text: &str, message: &str| check("loads.json", text, None, message);
        json(
            "{\"layers\":\n [[1, 2],\n [1, -2]]}",
            &format!(":3: expected {JSON}, found -2, where counts are 0 or more"),
        );
        json("{\"layers\":\n [[1, 2],\n [1]]}", ":3: expected 2 experts in layers[1], as in layers[0], found 1");
        json("{\"layers\":\n [[1, 2],\n [0, 0]]}", ":3: expected a load in layers[1], found none");
        json("{\"layers\": []}", &format!(":1: expected {JSON}, found no experts"));
        json("{\n}", &format!(":2: expected {JSON}, found missing field `layers`"));

        let log = |text: &str, steps, message: &str| check("log.jsonl", text, steps, message);
        const KEY: &str = "`load/layer N` with the tokens of each expert";
        let first = "{\"step\": 1, \"load/layer 0\": [1, 2]}\n";
        log("{\"step\": 1}\n{\"step\": 2}\n", None, &format!(":2: expected {KEY}, found steps 1 to 2 without"));
        log("", None, &format!(":1: expected {KEY}, found no steps"));
        log(first, Some((2, 3)), &format!(":1: expected {KEY} in a step from 2 to 3, found steps 1 to 1 without"));
        log(
            &format!("{first}{{\"step\": 2, \"load/layer 0\": [1]}}\n"),
            None,
            ":2: expected the layers and experts of line 1: 0 with 2, found 0 with 1",
        );
        log(
            "{\"step\": 1, \"load/layer 0\": [1, null]}\n",
            None,
            ":1: expected a list of counts of 0 or more in `load/layer 0`, found null",
        );
        log(
            "{\"step\": 1, \"load/layer x\": [1]}\n",
            None,
            ":1: expected the number of a layer in `load/layer x`, found x",
        );
        log("{\"step\": 1, \"load/layer 0\": [0]}\n", None, ":1: expected tokens in `load/layer 0`, found none");
        log("nonsense\n", None, ":1: expected an object with a `step`, found");
        let error = read(Path::new("/no/such.json"), None).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /no/such.json: No such file"), "{error}");
    }

    #[test]
    fn a_scene_can_say_it() {
        let check = |text: &str, load: RoutingLoad| assert_eq!(ron::from_str::<RoutingLoad>(text).unwrap(), load);
        check("Balanced", RoutingLoad::Balanced);
        check("Zipf(exponent: 0.5)", RoutingLoad::Zipf { exponent: 0.5, seed: 0 });
        check("Replay(path: \"runs/a\")", RoutingLoad::Replay { path: "runs/a".into(), steps: None });
    }
}
