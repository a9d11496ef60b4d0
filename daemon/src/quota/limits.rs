//! Quotas, users and groups as the configuration has them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;
use kvoyant_protocol::quota::{QUOTAS, Quota};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use crate::config::keys::nearest;

/// No limit.
const NONE: &str = "none";

/// A name that this machine does not know.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no {kind} `{name}` on this machine ({reason}); write a number for one that comes later")]
pub struct UnknownName {
    /// `user` or `group`.
    kind: &'static str,
    /// What was written.
    name: String,
    /// What the system said.
    reason: String,
}

/// A user, whom the configuration names or numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct User(pub u32);

/// A group, which the configuration names or numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(pub u32);

/// The number that a name has, or that was written.
fn resolve(
    kind: &'static str,
    name: &str,
    look_up: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, UnknownName> {
    let unknown = |reason: String| UnknownName { kind, name: name.into(), reason };
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
        let number = name.parse().ok().filter(|number| *number != u32::MAX);
        return number.ok_or_else(|| unknown("numbers end at 4294967294".into()));
    }
    if name.is_empty() || name.contains('\0') {
        return Err(unknown("that is no name".into()));
    }
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(unknown("nobody has that name".into())),
        Err(errno) => Err(unknown(errno.desc().into())),
    }
}

impl FromStr for User {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let found = |name: &str| Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw()));
        resolve("user", name, found).map(Self)
    }
}

impl FromStr for Group {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let found = |name: &str| Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()));
        resolve("group", name, found).map(Self)
    }
}

/// A name or a number.
fn named<'de, D: Deserializer<'de>, T: FromStr<Err = UnknownName>>(from: D) -> Result<T, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "it must be a name or a number")]
    enum Given {
        Number(u32),
        Text(String),
    }
    let text = match Given::deserialize(from)? {
        Given::Number(number) => number.to_string(),
        Given::Text(text) => text,
    };
    text.parse().map_err(D::Error::custom)
}

impl<'de> Deserialize<'de> for User {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        named(from)
    }
}

impl<'de> Deserialize<'de> for Group {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        named(from)
    }
}

impl Serialize for User {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(to)
    }
}

impl Serialize for Group {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(to)
    }
}

/// A quota that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{quota} = {text}: it must be {}, or \"{NONE}\"", if .quota.is_bytes() { "bytes, such as \"8GiB\"" } else { "a number" })]
pub struct BadAmount {
    quota: Quota,
    text: String,
}

/// How much of each thing somebody may have, where that is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits([Option<u64>; QUOTAS.len()]);

impl Limits {
    /// The same with one of them set.
    #[must_use]
    pub fn with(mut self, quota: Quota, limit: u64) -> Self {
        self.0[quota as usize] = Some(limit);
        self
    }

    /// The limit, if one is set; [`u64::MAX`] if it is set to none.
    #[must_use]
    pub fn get(&self, quota: Quota) -> Option<u64> {
        self.0[quota as usize]
    }

    fn set(&mut self, quota: Quota, amount: &Amount) -> Result<(), BadAmount> {
        let bad = |text: String| BadAmount { quota, text };
        let limit = match amount {
            Amount::Number(number) => *number,
            Amount::Text(text) if text == NONE => u64::MAX,
            Amount::Text(text) if quota.is_bytes() => {
                text.parse::<ByteSize>().map_err(|_| bad(format!("\"{text}\"")))?.as_u64()
            }
            Amount::Text(text) => text.parse().map_err(|_| bad(format!("\"{text}\"")))?,
        };
        self.0[quota as usize] = Some(limit);
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "it must be a number, or bytes as \"64GiB\", or `none`")]
enum Amount {
    Number(u64),
    Text(String),
}

/// Quotas: of everyone, and of users who have others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quotas {
    /// What everybody may have.
    pub everyone: Limits,
    /// What some users may have instead, as far as it is said.
    pub users: BTreeMap<User, Limits>,
}

impl Quotas {
    /// What a user may have, by quota; [`u64::MAX`] where there is no limit.
    #[must_use]
    pub fn of(&self, uid: u32) -> [u64; QUOTAS.len()] {
        let own = self.users.get(&User(uid));
        QUOTAS.map(|quota| {
            own.and_then(|own| own.get(quota)).or_else(|| self.everyone.get(quota)).unwrap_or(u64::MAX)
        })
    }
}

/// The key under which users have quotas of their own.
const USER: &str = "user";

struct Reader {
    users: bool,
}

impl<'de> Visitor<'de> for Reader {
    type Value = Quotas;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of quotas")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Quotas, M::Error> {
        let mut quotas = Quotas::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == USER && self.users {
                quotas.users = map.next_value::<Users>()?.0;
                continue;
            }
            let Some(quota) = QUOTAS.into_iter().find(|quota| quota.key() == key) else {
                let known: Vec<_> = QUOTAS.iter().map(|quota| quota.key()).collect();
                let meant = nearest(&key, known.iter().copied());
                return Err(M::Error::custom(format!(
                    "there is no quota `{key}`: there are {}{}{}",
                    known.join(", "),
                    if self.users { ", and tables [quotas.user.NAME]" } else { "" },
                    meant.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
                )));
            };
            quotas.everyone.set(quota, &map.next_value()?).map_err(M::Error::custom)?;
        }
        Ok(quotas)
    }
}

impl<'de> Deserialize<'de> for Quotas {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Reader { users: true })
    }
}

impl<'de> Deserialize<'de> for Limits {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(from.deserialize_map(Reader { users: false })?.everyone)
    }
}

struct Users(BTreeMap<User, Limits>);

impl<'de> Deserialize<'de> for Users {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut users = BTreeMap::new();
        // A user under a name and under a number would silently have one of the two.
        for (name, limits) in BTreeMap::<String, Limits>::deserialize(from)? {
            let user: User = name.parse().map_err(D::Error::custom)?;
            if users.insert(user, limits).is_some() {
                return Err(D::Error::custom(format!(
                    "user {} has two tables, `{name}` and another one",
                    user.0
                )));
            }
        }
        Ok(Self(users))
    }
}

fn write_limits<M: SerializeMap>(limits: &Limits, map: &mut M) -> Result<(), M::Error> {
    for quota in QUOTAS {
        match limits.get(quota) {
            None => {}
            Some(u64::MAX) => map.serialize_entry(quota.key(), NONE)?,
            Some(limit) => map.serialize_entry(quota.key(), &limit)?,
        }
    }
    Ok(())
}

impl Serialize for Limits {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        write_limits(self, &mut map)?;
        map.end()
    }
}

impl Serialize for Quotas {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        write_limits(&self.everyone, &mut map)?;
        if !self.users.is_empty() {
            let users: BTreeMap<String, &Limits> =
                self.users.iter().map(|(user, limits)| (user.0.to_string(), limits)).collect();
            map.serialize_entry(USER, &users)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Quotas, String> {
        use figment::providers::{Format, Toml};
        figment::Figment::from(Toml::string(text)).extract().map_err(|error| error.to_string())
    }

    #[test]
    fn a_users_own_quotas_win_and_the_rest_is_everyones() {
        let quotas = read(
            "host = \"8GiB\"\nsessions = 4\nin_flight = \"none\"\n[user.root]\nhost = \"none\"\n[user.1001]\nsessions = 0\n",
        )
        .unwrap();
        let of = |uid, quota: Quota| quotas.of(uid)[quota as usize];
        assert_eq!((of(7, Quota::Host), of(7, Quota::Sessions)), (8 << 30, 4));
        assert_eq!((of(7, Quota::InFlight), of(7, Quota::Spill)), (u64::MAX, u64::MAX));
        assert_eq!((of(0, Quota::Host), of(0, Quota::Sessions)), (u64::MAX, 4));
        assert_eq!((of(1001, Quota::Host), of(1001, Quota::Sessions)), (8 << 30, 0));
        let again: Quotas = serde_json::from_str(&serde_json::to_string(&quotas).unwrap()).unwrap();
        assert_eq!(again, quotas);
    }

    #[test]
    fn unknown_quotas_amounts_and_users_are_errors_that_say_so() {
        for (text, said) in [
            ("hots = 4", "no quota `hots`: there are sessions, sequences"),
            ("host = \"much\"", "host = \"much\": it must be bytes, such as \"8GiB\""),
            ("sessions = \"many\"", "sessions = \"many\": it must be a number"),
            (
                "[user.nobody-of-that-name]\nhost = 1",
                "no user `nobody-of-that-name` on this machine (nobody has",
            ),
            ("[user.99999999999]\nhost = 1", "numbers end at"),
            ("[user.root]\nhost = 1\n[user.0]\nhost = 2", "user 0 has two tables"),
            ("[user.root]\nuser = 1", "no quota `user`"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn users_and_groups_have_names_or_numbers() {
        assert_eq!("root".parse(), Ok(User(0)));
        assert_eq!("root".parse(), Ok(Group(0)));
        assert_eq!("123456".parse(), Ok(Group(123_456)));
        assert_eq!(serde_json::from_str::<Vec<User>>("[\"root\", 5, \"6\"]").unwrap(), [0, 5, 6].map(User));
        let error = "no-such-group".parse::<Group>().unwrap_err().to_string();
        assert!(error.contains("there is no group `no-such-group`"), "{error}");
        assert!("4294967295".parse::<User>().is_err() && "".parse::<User>().is_err());
    }
}
