//! Days, as chat templates write them.

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// The day of a time in seconds since 1970, in UTC, as `26 Nov 2025`.
#[must_use]
pub fn day(unix_seconds: u64) -> String {
    // Years begin in March here, so that the leap day is the last of its year.
    let days = unix_seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month < 2);
    let name = usize::try_from(month)
        .ok()
        .and_then(|month| MONTHS.get(month))
        .unwrap_or(&"");
    format!("{day:02} {name} {year}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, expect) in [
            (0, "01 Jan 1970"),
            (951_782_400, "29 Feb 2000"),
            (951_868_800, "01 Mar 2000"),
            (1_764_115_199, "25 Nov 2025"),
            (1_764_115_200, "26 Nov 2025"),
            (4_107_542_399, "28 Feb 2100"),
            (4_107_542_400, "01 Mar 2100"),
        ] {
            assert_eq!(day(seconds), expect);
        }
    }
}
