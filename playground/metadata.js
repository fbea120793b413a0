/** Reads the metadata of an ONNX file, which onnxruntime-web does not show. The file is a protocol buffer. */

const METADATA_PROPS = 14; // the field of ModelProto with an entry for each key: field 1 is the key, field 2 the value

/** Return the metadata that `lab/export_onnx.py` wrote; throws if the bytes are no such file. */
export function readMetadata(bytes) {
  const entries = {};
  for (const [field, content] of fields(bytes)) {
    if (field === METADATA_PROPS) {
      const [key, value] = [...fields(content)].map(([, text]) => new TextDecoder().decode(text));
      entries[key] = value;
    }
  }
  const number = (key) => {
    const value = Number(entries[key] ?? NaN);
    if (!Number.isFinite(value)) throw new Error(`the metadata lacks ${key}`);
    return value;
  };
  const keys = ["resolution", "channels", "classes", "sigma_min", "sigma_max"];
  return { name: entries.name ?? "", ...Object.fromEntries(keys.map((key) => [key, number(key)])) };
}

/** Yield the number and the content of each field of a protocol buffer: bytes, or a number as undefined. */
function* fields(bytes) {
  let place = 0;
  const varint = () => {
    for (let value = 0, scale = 1; place < bytes.length; scale *= 128) {
      const byte = bytes[place++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new Error("the file ends too early");
  };
  while (place < bytes.length) {
    const tag = varint();
    const [field, type] = [Math.floor(tag / 8), tag % 8];
    if (type === 0) {
      varint();
      yield [field, undefined];
    } else if (type === 2) {
      const length = varint();
      if (place + length > bytes.length) throw new Error("the file ends too early");
      yield [field, bytes.subarray(place, (place += length))];
    } else {
      throw new Error("not an ONNX file");
    }
  }
}
