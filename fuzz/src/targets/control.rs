//! Control messages, as either side gets them.

use kvoyant_protocol::control::{
    Failure, ModelSpec, SelectedBy, ToClient, ToDaemon, decode, encode, features,
};
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::wire::SequenceId;

/// Bytes before a message's body: magic and version.
const HEADER_BYTES: usize = 12;

/// Behind a good header and as they are, any bytes are a message or an error, and a message says itself again.
///
/// # Panics
/// If it does not.
pub fn run(bytes: &[u8]) {
    let mut framed = encode(&ToDaemon::Mapped);
    framed.truncate(HEADER_BYTES);
    framed.extend_from_slice(bytes);
    for message in [bytes, &framed] {
        if let Ok(message) = decode::<ToDaemon>(message) {
            assert_eq!(decode::<ToDaemon>(&encode(&message)).as_ref(), Ok(&message));
            if let ToDaemon::Hello { limits, .. } = message {
                let _ = Layout::new(limits);
            }
        }
        if let Ok(message) = decode::<ToClient>(message) {
            assert_eq!(decode::<ToClient>(&encode(&message)).as_ref(), Ok(&message));
            if let ToClient::Failed(failure) = message {
                // Some are texts of the daemon's alone, which may be empty here.
                let _ = failure.to_string();
            }
        }
    }
}

/// A model to register.
fn spec(methods: &[&str]) -> ModelSpec {
    ModelSpec {
        name: "fuzz".into(),
        fingerprint: "0".repeat(32),
        adapter: String::new(),
        rope: String::new(),
        layers: 3,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 32,
        latent_values: 0,
        dtype: 1,
        page_rows: 0,
        sinks: 4,
        window: 16,
        dense_layers: 1,
        sliding_layers: Vec::new(),
        methods: methods.iter().map(ToString::to_string).collect(),
        slab_bytes: 0,
        graph: None,
        artifacts: Vec::new(),
    }
}

/// Bodies of a message of most kinds.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let sequence = SequenceId { slot: 0, generation: 1 };
    let by = SelectedBy::Lane;
    let asked = [
        ToDaemon::Hello {
            features: features::COMMON,
            name: "fuzz".into(),
            limits: Limits::default(),
            minor: 0,
        },
        ToDaemon::Mapped,
        ToDaemon::Register(spec(&["quest:budget=6%", "window"])),
        ToDaemon::Open { method: 0, tokens: 4096, by },
        ToDaemon::Fork { parent: sequence, method: Some(1), by },
        ToDaemon::Reserve { sequences: vec![(sequence, 300), (sequence, u32::MAX)] },
        ToDaemon::Truncate { sequence, tokens: 7 },
        ToDaemon::Suspend { sequence, image: "chat".into(), overwrite: true, label: "a label".into() },
        ToDaemon::Resume { image: "chat".into(), method: None, by: SelectedBy::Client },
        ToDaemon::Publish { sequence, tokens: 128, shared: true },
        ToDaemon::Attach { method: 1, by, tokens: 128 },
        ToDaemon::Close { sequences: vec![sequence; 3] },
        ToDaemon::Keep,
        ToDaemon::Claim { session: 1, token: [7, u64::MAX], extents: 3 },
        ToDaemon::Takeover,
    ];
    let answers = [
        ToClient::Welcome { features: 3, session: 1, boot_id: 7, limits: Limits::default(), minor: 0 },
        ToClient::Failed(Failure::Protocol("a reason".into())),
        ToClient::Failed(Failure::RowsLost { sequence, token: 64 }),
        ToClient::Kept { token: [1, 2], seconds: 30 },
        ToClient::Handed { names: vec!["kvoyant.1.extent.77".into()] },
    ];
    let body = |bytes: Vec<u8>| bytes[HEADER_BYTES..].to_vec();
    let asked = asked.iter().map(|message| body(encode(message)));
    asked.chain(answers.iter().map(|message| body(encode(message)))).collect()
}
