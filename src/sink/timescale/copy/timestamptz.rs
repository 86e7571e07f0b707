//! PostgreSQL's `timestamptz`: microseconds since 2000-01-01T00:00:00Z.

use bytes::{BufMut, BytesMut};
use fleetwright_decode::time::Time;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

/// PostgreSQL's epoch.
pub(crate) const EPOCH: Time = Time::YEAR_2000;

/// The binary format of a time.
#[must_use]
pub fn encode(time: Time) -> [u8; 8] {
    time.0.saturating_sub(EPOCH.0).to_be_bytes()
}

/// A [`Time`] as a parameter or a column of a statement.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timestamptz(pub Time);

impl<'a> FromSql<'a> for Timestamptz {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(Time(i64::from_be_bytes(raw.try_into()?).saturating_add(EPOCH.0))))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Timestamptz {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.put_slice(&encode(self.0));
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}
