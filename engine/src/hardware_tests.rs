//! Task durations by hand, and what is said about figures that are not there.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;

fn given<T>(value: T) -> Sourced<T> {
    Sourced::new(value, "test")
}

/// A device on which a microsecond is 8e6 fp8, 4e6 bf16 or 1e6 other operations, or 1e5 bytes.
pub(crate) fn spec() -> DeviceSpec {
    let some = |value: f64| Some(given(value));
    let link = |rate, latency| Some(Link { bytes_per_sec: given(rate), latency_secs: given(latency) });
    DeviceSpec {
        name: "test".into(),
        file: "test.ron".into(),
        num_sms: given(100),
        comm_sms: given(20),
        peak_flops_per_sec: PerFormat { fp8: some(16e12), bf16: some(8e12), f32: some(1e12), f64: None },
        product_efficiency: PerFormat { fp8: some(0.5), bf16: some(0.5), f32: some(1.0), f64: None },
        core_efficiency: given(0.5),
        core_grad_efficiency: given(0.25),
        memory_bytes: given(1 << 30),
        memory_bytes_per_sec: given(2e11),
        memory_efficiency: given(0.5),
        cast_efficiency: some(0.25),
        intra_node: link(1e10, 1e-6),
        inter_node: link(1e9, 5e-6),
        ranks_per_node: given(8),
        launch_secs: given(2e-6),
        host_launch_secs: given(1e-6),
        idle_watts: some(100.0),
        busy_watts: some(500.0),
        pue: some(1.5),
        price_per_hour: some(2.0),
        corrections: Corrections::default(),
    }
}

#[test]
fn a_task_takes_its_slowest_resource_plus_casts_plus_the_launch() {
    let none = Cost::default();
    let product = Cost { product_flops: 8_000_000, ..none };
    let all = Cost { core_flops: 4_000_000, core_grad_flops: 2_000_000, vector_flops: 1_000_000, ..product };
    let memory = Cost { read_bytes: 300_000, written_bytes: 100_000, product_flops: 1, ..none };
    let cast = Cost { cast_elements: 50_000, ..product };
    let both_links = Cost { intra_node_bytes: 20_000, inter_node_bytes: 1_000, ..none };
    for (name, cost, format, nanos) in [
        ("nothing", none, Format::F32, 2_000),
        ("a product in fp8", product, Format::Fp8, 3_000),
        ("a product in bf16", product, Format::Bf16, 4_000),
        ("a product in f32", product, Format::F32, 10_000),
        ("classes add up, the core's in high precision", all, Format::Fp8, 2_000 + 1_000 + 1_000 + 1_000 + 1_000),
        ("memory bound", memory, Format::F32, 6_000),
        ("casts come before the product", cast, Format::Fp8, 3_000 + 3_000),
        ("no casts in bf16", cast, Format::Bf16, 4_000),
        ("links overlap, each with its latency", both_links, Format::F32, 2_000 + 6_000),
        ("a link in the node", Cost { inter_node_bytes: 0, ..both_links }, Format::F32, 2_000 + 3_000),
        ("computation hides communication", Cost { product_flops: 80_000_000, ..both_links }, Format::Fp8, 12_000),
    ] {
        assert_eq!(spec().task_nanos("k", &cost, format).unwrap(), nanos, "{name}");
    }
}

#[test]
fn corrections_scale_work_and_replace_the_launch() {
    let kind_factors = [("slow".to_owned(), 3.0)].into();
    let corrections = Corrections { kind_factors, launch_secs: Some(5e-6) };
    let spec = DeviceSpec { corrections, ..spec() };
    let cost = Cost { vector_flops: 1_000_000, ..Cost::default() };
    assert_eq!(spec.task_nanos("slow", &cost, Format::F32).unwrap(), 8_000);
    assert_eq!(spec.task_nanos("other", &cost, Format::F32).unwrap(), 6_000);
}

#[test]
fn communication_leaves_its_share_of_the_multiprocessors() {
    let cost = Cost { product_flops: 8_000_000, ..Cost::default() };
    let memory = Cost { read_bytes: 100_000, ..Cost::default() };
    let left = spec().beside_communication();
    assert_eq!((left.num_sms.value, left.comm_sms.value), (80, 0));
    assert_eq!(left.task_nanos("k", &cost, Format::Fp8).unwrap(), 2_000 + 1_250);
    assert_eq!(left.task_nanos("k", &memory, Format::Fp8).unwrap(), 2_000 + 1_000);
    assert_eq!(left.beside_communication(), left);
}

#[test]
fn only_what_is_needed_and_missing_is_an_error_and_all_of_it() {
    let mut spec = DeviceSpec { cast_efficiency: None, inter_node: None, price_per_hour: None, ..spec() };
    spec.product_efficiency.fp8 = None;
    let cost =
        Cost { product_flops: 8_000_000, cast_elements: 1, inter_node_bytes: 1, core_flops: 1, ..Cost::default() };
    assert!(spec.task_secs("k", &Cost { inter_node_bytes: 0, ..cost }, Format::Bf16).is_ok());
    let text = spec.task_secs("k", &cost, Format::Fp8).unwrap_err().to_string();
    let source = r#"source: "where the figure is from""#;
    let lines: Vec<String> = [
        format!(
            "product_efficiency.fp8`, which is needed here; add `product_efficiency: (fp8: (value: .., {source}))`"
        ),
        format!(
            "inter_node`, which is needed here; add `inter_node: (bytes_per_sec: (value: .., {source}), \
             latency_secs: (value: .., {source}))`"
        ),
        format!("cast_efficiency`, which is needed here; add `cast_efficiency: (value: .., {source})`"),
    ]
    .map(|line| format!("test.ron does not give `{line}"))
    .into();
    assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    assert!(spec.task_secs("k", &cost, Format::F64).unwrap_err().to_string().contains("`peak_flops_per_sec.f64`"));
    assert!(spec.price(1.0).unwrap_err().to_string().contains("`price_per_hour`"));
}

#[test]
fn energy_and_price_are_of_one_device() {
    assert_eq!(spec().energy_kwh(2.0, 1.0).unwrap(), 1.5 * (1000.0 + 100.0) / 3.6e6);
    assert_eq!(spec().price(1800.0).unwrap(), 1.0);
}
