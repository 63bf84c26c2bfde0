//! A scene as a form: every value with its path and the place it is written at, and a way to change one in the text. Whoever
//! edits so keeps comments and layout: only the value's own bytes change.

use std::ops::Range;

use super::{
    Loaded, syntax,
    tree::{Kind, Node, Seg, segments},
};

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormValue {
    /// Dotted path, as in `--set`.
    pub path: String,
    /// As RON.
    pub value: String,
    /// Bytes of the scene's own text; none if the value is a default, or of the scene that this one extends.
    pub written_at: Option<Range<usize>>,
}

/// Values by section, in the order of the format; those of no section first, under an empty name.
///
/// # Errors
/// RON's, if a value has no RON form.
pub fn form(loaded: &Loaded, text: &str) -> Result<Vec<(String, Vec<FormValue>)>, ron::Error> {
    let whole = loaded.to_ron()?;
    let (Ok((root, _)), own) = (syntax::parse(&whole, 0, 0), syntax::parse(text, 0, 0)) else { return Ok(Vec::new()) };
    let own = own.ok().map(|(node, _)| node);
    let mut sections = vec![(String::new(), Vec::new())];
    for (key, value) in fields(&root) {
        if fields(value).next().is_some() {
            let mut values = Vec::new();
            leaves(key, value, &whole, own.as_ref(), &mut values);
            sections.push((key.to_owned(), values));
        } else {
            leaves(key, value, &whole, own.as_ref(), &mut sections[0].1);
        }
    }
    Ok(sections)
}

fn fields(node: &Node) -> impl Iterator<Item = (&str, &Node)> {
    let fields = match &node.kind {
        Kind::Struct { fields, .. } => &fields[..],
        _ => &[],
    };
    fields.iter().map(|field| (field.key.as_str(), &field.value))
}

/// Adds what is at `path`: a value, or those of its fields.
fn leaves(path: &str, node: &Node, text: &str, own: Option<&Node>, values: &mut Vec<FormValue>) {
    if fields(node).next().is_some() {
        for (key, value) in fields(node) {
            leaves(&format!("{path}.{key}"), value, text, own, values);
        }
        return;
    }
    let found = own.map(|own| own.find(&segments(path))).filter(|found| found.complete);
    let written_at = found.map(|found| found.node.at.start..found.node.at.end);
    values.push(FormValue { path: path.to_owned(), value: text[node.at.start..node.at.end].to_owned(), written_at });
}

/// `text` with the value at `path` replaced, or added where it would stand.
///
/// # Errors
/// If the text cannot be read, the value is no RON, or something stands in the way of the path.
pub fn set(text: &str, path: &str, value: &str) -> Result<String, String> {
    let value = value.trim();
    syntax::parse(value, 0, 0).map_err(|found| format!("`{path}`: {}", found.message))?;
    let (root, _) = syntax::parse(text, 0, 0).map_err(|found| found.message)?;
    let path_segs = segments(path);
    let depth = (0..=path_segs.len()).rev().find(|n| root.find(&path_segs[..*n]).complete).unwrap_or(0);
    let node = root.find(&path_segs[..depth]).node;
    if depth == path_segs.len() {
        return Ok(format!("{}{value}{}", &text[..node.at.start], &text[node.at.end..]));
    }
    let Kind::Struct { fields, .. } = &node.kind else {
        return Err(format!("`{path}` cannot be set: {} stands in its way", node.describe()));
    };
    let mut added = value.to_owned();
    for (i, seg) in path_segs[depth..].iter().enumerate().rev() {
        let Seg::Field(key) = seg else { return Err(format!("`{path}` cannot be set: it has no such item")) };
        added = if i == 0 { format!("{key}: {added}") } else { format!("({key}: {added})") };
    }
    let end = node.at.end - 1;
    let last =
        fields.last().map_or(node.at.start + text[node.at.start..].find('(').unwrap_or(0) + 1, |f| f.value.at.end);
    let between = &text[last..end];
    let without_comments: String = between.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let comma = if fields.is_empty() || without_comments.contains(',') { "" } else { "," };
    let inserted = if text[node.at.start..node.at.end].contains('\n') {
        let indent = "    ".repeat(depth + 1);
        format!("{comma}{}\n{indent}{added},\n{}", between.trim_end(), "    ".repeat(depth))
    } else {
        let blank = if fields.is_empty() || between.ends_with(' ') { "" } else { " " };
        format!("{comma}{between}{blank}{added}")
    };
    Ok(format!("{}{inserted}{}", &text[..last], &text[end..]))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;
    use crate::scene::Scene;

    #[test]
    fn a_value_changes_and_all_else_stays() {
        let text = "(\n    // why\n    mesh: (pp: 2), // ranks\n    seed: 3\n)\n";
        let check = |path: &str, value: &str, want: &str| assert_eq!(set(text, path, value).unwrap(), want, "{path}");
        check("mesh.pp", "4", "(\n    // why\n    mesh: (pp: 4), // ranks\n    seed: 3\n)\n");
        check("mesh.ep", "4", "(\n    // why\n    mesh: (pp: 2, ep: 4), // ranks\n    seed: 3\n)\n");
        check("name", "\"a\"", "(\n    // why\n    mesh: (pp: 2), // ranks\n    seed: 3,\n    name: \"a\",\n)\n");
        let added = set(text, "pipeline.schedule", "DualPipe").unwrap();
        assert!(added.ends_with("    seed: 3,\n    pipeline: (schedule: DualPipe),\n)\n"), "{added}");
        assert_eq!(set("()", "mesh.pp", "2").unwrap(), "(mesh: (pp: 2))");
        assert!(set(text, "mesh.pp", "(").is_err());
        assert!(set(text, "seed.x", "1").unwrap_err().contains("stands in its way"));
    }

    #[test]
    fn every_value_of_a_scene_is_in_its_form() {
        let text = "(name: \"a\", mesh: (pp: 2), optimizer: AdamW(beta1: 0.5))";
        let loaded = Scene::parse(text, &[]).unwrap();
        let form = form(&loaded, text).unwrap();
        let find = |path: &str| form.iter().flat_map(|(_, values)| values).find(|value| value.path == path).unwrap();
        assert_eq!(&text[find("mesh.pp").written_at.clone().unwrap()], "2");
        assert_eq!((&*find("mesh.ep").value, &find("mesh.ep").written_at), ("1", &None));
        assert_eq!((&*find("optimizer.beta1").value, find("optimizer.beta1").written_at.is_some()), ("0.5", true));
        assert_eq!(form[0].0, "");
        assert!(form.iter().any(|(name, _)| name == "optimizer"));
    }
}
