//! What heads get by their roles.

use std::sync::Arc;

use super::*;
use crate::artifact::{Artifact, ArtifactKind, Artifacts, Tensor, TensorArtifact};

/// The first KV head of each layer is an anchor, the second one volatile.
fn roles() -> Artifacts {
    let shape = small();
    let tensor =
        |values: [f32; 2]| Tensor { shape: vec![shape.layers, 2], values: values.repeat(shape.layers) };
    let tensors = [("role", [0.0, 2.0]), ("pivot", [0.0, 1.0]), ("stability", [1.0, 0.25])];
    let tensors = tensors.map(|(name, values)| (name.to_owned(), tensor(values))).into();
    let artifact = TensorArtifact::new(ArtifactKind::Roles, shape.fingerprint, tensors, Default::default());
    [Artifact::Tensors(Arc::new(artifact.unwrap()))].into_iter().collect()
}

fn with_parts(options: &str, parts: [f32; 2]) -> Kvoyant {
    method(options).with_parts(vec![parts.to_vec(); small().layers])
}

/// Rows that each head selects of those with digests, at 280 tokens and then at 281.
fn rows(method: &Kvoyant) -> [[usize; 2]; 2] {
    let mut case = case(method, 0, 281, 1.0, 11);
    [280, 281].map(|tokens| {
        let hint = case.hint.clone();
        let context = SelectContext::new(&small(), 1, tokens, &hint);
        let selection = case.kept.select_with(method, &context, &mut Scratch::new());
        [0, 1].map(|head| selection.tokens(head).filter(|token| *token < 256).count())
    })
}

#[test]
fn a_budget_is_divided_by_the_roles_of_the_artifact() {
    let spec: MethodSpec = "kvoyant:budget=24,scope=head,roles=1/1/3/1".parse().unwrap();
    assert_eq!(spec.artifact(), Some(ArtifactKind::Roles));
    let missing = spec.build(&small(), &Artifacts::default()).unwrap_err().to_string();
    assert!(missing.contains("roles"), "{missing}");
    assert!(spec.build(&small(), &roles()).is_ok());
    let of = |by: &str| {
        crate::hetero::parts(
            roles().tensors(NAME, ArtifactKind::Roles, &small()).unwrap(),
            &small(),
            by.parse().unwrap(),
        )
        .unwrap()
    };
    assert_eq!(of("1/1/3/1")[1], [0.5, 1.5]);
    assert_eq!(of("equal")[0], [1.0, 1.0]);
    let [stable, volatile] = of("stability")[0][..] else { panic!("two heads") };
    assert!(stable <= volatile && (stable + volatile - 2.0).abs() < 1e-6);
    assert_eq!(rows(&with_parts("budget=24,scope=head", [0.5, 1.5])), [[12, 36]; 2]);
    assert_eq!(rows(&method("budget=24,scope=head")), [[24, 24]; 2]);
}

#[test]
fn by_one_threshold_a_head_with_a_larger_part_gets_rows_of_smaller_shares() {
    let [alike, parted] = [[1.0, 1.0], [0.5, 1.5]].map(|parts| rows(&with_parts("budget=24", parts)));
    assert_eq!(alike, rows(&method("budget=24")));
    // The first step divides the budget as it stands, the second has a threshold.
    assert_eq!((alike[0], parted[0]), ([24, 24], [12, 36]));
    assert!(parted[1][0] < alike[1][0] && parted[1][1] > alike[1][1], "{alike:?} {parted:?}");
}

#[test]
fn roles_that_divide_nothing_are_refused_and_read_back_as_written() {
    for (options, other) in [("max_missed_mass=0.1", "max_missed_mass"), ("budget=5,scope=layer", "scope")] {
        let refused = format!("kvoyant:{options},roles=equal").parse::<MethodSpec>().unwrap_err().to_string();
        assert!(refused.contains(other) && refused.contains("roles"), "{refused}");
    }
    assert!("kvoyant:roles=1/2/3".parse::<MethodSpec>().is_err());
    let text = "kvoyant:budget=5,roles=1/0.5/2/4";
    assert_eq!(text.parse::<MethodSpec>().unwrap().to_string(), text);
}
