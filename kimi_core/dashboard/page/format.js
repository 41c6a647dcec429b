// Numbers, times and addresses as text.

/** A number with about four digits; – for what was not measured. */
export function number(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

/** A number with a sign and `digits` after the point. */
export function signed(value, digits = 3) {
  if (value == null) return "–";
  return (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(digits);
}

export function fixed(value, digits = 3) {
  return value == null ? "–" : value.toFixed(digits);
}

export function percent(value) {
  return value == null ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
}

/** Seconds as 45 s, 2:14 or 1:02:14. */
export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const [hours, rest] = [Math.floor(seconds / 3600), Math.round(seconds) % 3600];
  const [minutes, left] = [Math.floor(rest / 60), String(rest % 60).padStart(2, "0")];
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${left}` : `${minutes}:${left}`;
}

/** How long ago a time in seconds since 1970 was. */
export function ago(time) {
  if (time == null) return "–";
  const seconds = Math.max(0, Date.now() / 1000 - time);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let at = 0;
  for (; count >= 1000 && at < 3; at++) count /= 1000;
  return `${count.toFixed(at && count < 10 ? 1 : 0)} ${units[at]}`;
}

/** The address of a page of a run: link("think", "iteration", 3). */
export function link(run, ...parts) {
  return "#/" + ["run", run, ...parts].map(encodeURIComponent).join("/");
}

export function mean(values) {
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

/** Standard deviation over all values. */
export function spread(values) {
  const middle = mean(values);
  return values.length ? Math.sqrt(mean(values.map((v) => (v - middle) ** 2))) : null;
}
