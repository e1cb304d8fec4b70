//! Sizes as people write them.

/// Parses `512`, `10k`, `1.5G`, `2TiB`: bytes, with binary suffixes as in QEMU's options.
pub fn parse_size(s: &str) -> Option<u64> {
    let s = s.trim();
    let digits = s
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(s.len());
    let (number, suffix) = s.split_at(digits);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => return None,
    };
    if let Ok(n) = number.parse::<u64>() {
        return n.checked_mul(1 << shift);
    }
    let (whole, fraction) = number.split_once('.')?;
    if shift == 0 || fraction.is_empty() || fraction.len() > 15 {
        return None;
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let whole = u128::from(whole.parse::<u64>().ok()?);
    let fraction = u128::from(fraction.parse::<u64>().ok()?);
    u64::try_from(((whole * scale + fraction) << shift) / scale).ok()
}

/// Formats bytes with the largest binary unit that leaves a short number: `20 GiB`, `1.5 KiB`.
pub fn format_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("10k"), Some(10240));
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        assert_eq!(parse_size("2TiB"), Some(2 << 40));
        for bad in [
            "",
            "G",
            "1.G",
            "1,5G",
            "-1",
            "99999999E",
            "1.5",
            "1x",
            "0x10",
        ] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(format_size(0), "0 B");
        assert_eq!(format_size(1536), "1.5 KiB");
        assert_eq!(format_size(20 << 30), "20 GiB");
        assert_eq!(format_size(u64::MAX), "16 EiB");
    }
}
