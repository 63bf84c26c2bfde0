//! Descriptions of hardware as files: read with the scene's reader, so that they can extend each other and everything that
//! is wrong is told at once, by its place. A figure without a source is refused: nobody could judge a plan made with it.
use std::path::Path;

use engine::hardware::{DeviceSpec, example};
use ron::extensions::Extensions;

use super::de;
use super::diagnostic::{Finding, SceneErrors};
use super::source::{self, Read, Sources};
use super::tree::{Kind, Node};

/// Figures that may be zero.
const MAY_BE_ZERO: [&str; 6] =
    ["comm_sms", "latency_secs", "launch_secs", "host_launch_secs", "idle_watts", "price_per_hour"];

/// Reads the description at `path`; `overrides` are as a scene's (`comm_sms.value=0`).
///
/// # Errors
/// Everything that is missing, not known, of the wrong type, out of range or without a source, with a line that would do.
pub fn load(path: &Path, overrides: &[String]) -> Result<DeviceSpec, SceneErrors> {
    let mut sources = Sources::default();
    let read = source::read_file(path, overrides, &mut sources);
    let spec = spec(read, &sources).map_err(|findings| SceneErrors::new(findings, &sources).about("the hardware"))?;
    Ok(DeviceSpec { file: path.display().to_string(), ..spec })
}

fn spec(read: Result<Read, Vec<Finding>>, sources: &Sources) -> Result<DeviceSpec, Vec<Finding>> {
    let Read { root, mut findings } = read?;
    let read = de::read::<DeviceSpec>(&root, sources);
    figures(&root, "", &mut findings);
    let faults = match read {
        Ok(spec) if findings.is_empty() => return Ok(spec),
        Ok(_) => Vec::new(),
        Err(faults) => faults,
    };
    findings.extend(faults.into_iter().map(|fault| {
        let figure = fault.path.trim_end_matches(".value").trim_end_matches(".source");
        let advice = || match figure {
            "" => None,
            "name" => Some(r#"write `name: "H100"`"#.to_owned()),
            figure => Some(format!("write `{}`", example(figure))),
        };
        Finding { help: fault.help.clone().or_else(advice), ..fault }
    }));
    Err(findings)
}

/// What a figure that is too large for a number is told.
const FINITE: &str = "be a finite number, of 1.7e308 at most";

/// Judges the figures below `node`: their sources, and the range of their values.
fn figures(node: &Node, path: &str, findings: &mut Vec<Finding>) {
    let Kind::Struct { fields, .. } = &node.kind else { return };
    for field in fields {
        let below = if path.is_empty() { field.key.clone() } else { format!("{path}.{}", field.key) };
        let mut wrong = |expected: &str| {
            let message = format!("`{below}` must {expected}, but is {}", field.value.describe());
            let finding =
                Finding::new(field.value.at, message, "this value").help(format!("write `{}`", example(path)));
            findings.push(Finding { path: below.clone(), ..finding });
        };
        match (&*field.key, &field.value.kind) {
            ("source", Kind::Text(text)) => {
                if ron::from_str::<String>(text).is_ok_and(|text| text.trim().is_empty()) {
                    wrong("say where the figure is from");
                }
            }
            ("value", Kind::Word(word)) if matches!(&**word, "inf" | "NaN") => wrong(FINITE),
            ("value", Kind::Number(text)) => {
                let Ok(value) = ron::from_str::<f64>(text) else { continue };
                let name = path.rsplit('.').next().unwrap_or_default();
                let (holds, expected) = if value.is_infinite() {
                    (false, FINITE)
                } else if path.contains("efficiency") {
                    (value > 0.0 && value <= 1.0, "be above 0 and at most 1")
                } else if MAY_BE_ZERO.contains(&name) {
                    (value >= 0.0 && value.is_finite(), "be 0 or more")
                } else {
                    (value > 0.0 && value.is_finite(), "be above 0")
                };
                if !holds {
                    wrong(expected);
                }
            }
            _ => figures(&field.value, &below, findings),
        }
    }
}

/// The description as a file, under `comment`, one line of it a line. Loading it gives an equal description.
///
/// # Errors
/// RON's, if a figure has no RON form.
pub fn to_ron(spec: &DeviceSpec, comment: &str) -> Result<String, ron::Error> {
    let options = ron::Options::default().with_default_extension(Extensions::IMPLICIT_SOME);
    let config = ron::ser::PrettyConfig::new().new_line("\n").depth_limit(2);
    let body = options.to_string_pretty(spec, config)?;
    Ok(comment.lines().map(|line| format!("// {line}\n")).collect::<String>() + &body + "\n")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::{fs, path::PathBuf};

    use engine::hardware::Format;
    use kernels::{
        cost::Cost,
        ops::{attention, gemm, grouped_gemm},
    };

    use super::*;

    fn file(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenes/hardware").join(name)
    }

    fn shipped(name: &str) -> DeviceSpec {
        load(&file(name), &[]).unwrap_or_else(|errors| panic!("{name}:\n{errors}"))
    }

    /// `text` in a file, loaded.
    fn loaded(text: &str) -> Result<DeviceSpec, SceneErrors> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.ron");
        fs::write(&path, text).unwrap();
        load(&path, &[])
    }

    #[test]
    fn every_shipped_description_has_all_that_a_plan_needs() {
        let cost = Cost { product_flops: 1, core_flops: 1, core_grad_flops: 1, vector_flops: 1, ..Cost::default() };
        let cost = Cost { read_bytes: 1, cast_elements: 1, intra_node_bytes: 1, inter_node_bytes: 1, ..cost };
        for name in ["a100.ron", "h100.ron", "h200.ron", "h800.ron", "b200.ron"] {
            let spec = shipped(name);
            spec.task_secs("k", &cost, Format::Bf16).unwrap();
            assert_eq!(spec.task_secs("k", &cost, Format::Fp8).is_ok(), name != "a100.ron", "{name}");
            assert!(spec.price(1.0).is_ok() && spec.energy_kwh(1.0, 1.0).is_ok(), "{name}");
            let text = to_ron(&spec, "again").unwrap();
            let again = loaded(&text).unwrap_or_else(|errors| panic!("{name}:\n{errors}"));
            assert_eq!(DeviceSpec { file: spec.file.clone(), ..again }, spec);
        }
    }

    #[test]
    fn an_overlapped_chunk_of_deepseek_v3_takes_what_its_profile_says() {
        // Four layers, forward of one sequence of 4096 tokens and backward of another: profile-data, train.json. The shares in
        // the file come from there, so this checks how costs are counted and combined, and no prediction.
        let (t, rows, layers) = (4096, 8 * 4096, 4);
        let linear =
            [[1536, 7168], [24576, 1536], [576, 7168], [32768, 512], [7168, 16384], [4096, 7168], [7168, 2048]];
        let mut products = Cost::default();
        for pass in [gemm::forward_cost, gemm::input_grad_cost, gemm::weight_grad_cost] {
            products += linear.iter().map(|&[o, i]| pass(t, o, i, 2)).sum();
        }
        for pass in [grouped_gemm::forward_cost, grouped_gemm::input_grad_cost, grouped_gemm::weight_grad_cost] {
            products += pass(rows, 4, 4096, 7168, 2) + pass(rows, 4, 7168, 2048, 2);
        }
        let pairs = attention::causal_pairs(t as u64);
        let sizes = [128, 128, 192, 128];
        let device = shipped("h800.ron").beside_communication();
        let millis = |cost: Cost| {
            let cost: Cost = (0..layers).map(|_| cost).sum();
            let secs = device.task_secs("k", &cost, Format::Fp8).unwrap() - device.launch_secs();
            (secs * 1e3 * 100.0).round() / 100.0
        };
        let close = |got: f64, want: f64| assert!((got - want).abs() < 0.01 * want, "{got} for {want}");
        let uncast = Cost { cast_elements: 0, ..products };
        close(millis(uncast), 74.5);
        close(millis(products) - millis(uncast), 16.7);
        close(millis(attention::cost(t, pairs, sizes, 2)), 4.95);
        close(millis(attention::input_grad_cost(t, pairs, sizes, 2)), 15.1 + 1.9);
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once_with_a_line_that_would_do() {
        let text = fs::read_to_string(file("h800.ron")).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let at = |lines: &[String], start: &str| lines.iter().position(|line| line.trim().starts_with(start)).unwrap();
        let line = at(&lines, "num_sms");
        lines[line] = r#"    num_sms: (value: 132, source: " "),"#.into();
        let line = at(&lines, "comm_sms");
        lines.remove(line);
        let line = at(&lines, "core_efficiency");
        lines[line] = r#"    core_efficiency: (value: 66.2, source: "s"),"#.into();
        let line = at(&lines, "core_grad_efficiency");
        lines[line] = "    core_grad_efficiency: 0.5,".into();
        let line = at(&lines, "memory_bytes_per_sec");
        lines[line] = "    memory_bytes_per_sec: (value: 3.35e12),".into();
        let line = at(&lines, "pue");
        lines[line] = r#"    puee: (value: 1.5, source: "s"),"#.into();
        let text = loaded(&lines.join("\n")).unwrap_err().to_string();
        for want in [
            "mine.ron:6:35: error: `num_sms.source` must say where the figure is from",
            "the hardware lacks the field `comm_sms`",
            r#"write `comm_sms: (value: .., source: "where the figure is from")`"#,
            "`core_efficiency.value` must be above 0 and at most 1, but is the number 66.2",
            "`core_grad_efficiency` must be a struct `( .. )`, but is the number 0.5",
            r#"write `core_grad_efficiency: (value: .., source: "where the figure is from")`"#,
            "`memory_bytes_per_sec` lacks the field `source`",
            "the hardware has no field `puee`",
            "did you mean `pue`?",
            "6 errors in the hardware",
        ] {
            assert!(text.contains(want), "expected `{want}` in\n{text}");
        }
    }

    #[test]
    fn a_figure_that_is_too_large_is_said_to_be() {
        let text = fs::read_to_string(file("h100.ron")).unwrap();
        let line = text.lines().find(|line| line.trim_start().starts_with("memory_bytes_per_sec:")).unwrap();
        for (number, found) in [
            ("1e400", "the number 1e400"),
            ("-1e400", "the number -1e400"),
            ("inf", "the word `inf`"),
            ("NaN", "the word `NaN`"),
        ] {
            let wrong = format!("    memory_bytes_per_sec: (value: {number}, source: \"s\"),");
            let error = loaded(&text.replace(line, &wrong)).unwrap_err().to_string();
            assert!(
                error.contains(&format!(
                    "`memory_bytes_per_sec.value` must be a finite number, of 1.7e308 at most, but is {found}"
                )),
                "{number}: {error}"
            );
        }
    }

    #[test]
    fn a_description_can_extend_another_and_be_overridden() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.ron");
        let base = file("h100.ron").canonicalize().unwrap();
        fs::write(
            &path,
            format!("(extends: {base:?}, name: \"mine\", price_per_hour: (value: 9.0, source: \"offer\"))"),
        )
        .unwrap();
        let spec = load(&path, &["comm_sms.value=0".to_owned()]).unwrap();
        assert_eq!((&*spec.name, spec.comm_sms.value, spec.price(3600.0).unwrap()), ("mine", 0, 9.0));
        assert!(spec.file.ends_with("mine.ron"));
        let text = load(Path::new("none.ron"), &[]).unwrap_err().to_string();
        assert!(text.contains("cannot read the hardware file `none.ron`"), "{text}");
    }
}
